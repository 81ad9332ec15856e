"""Warm models with recorded passes, on a CUDA device or with a stand-in on the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from msgspec import structs

from models.cuda.graphs import Graphs, Record, Work
from models.cuda.recorder import GraphRecorder
from models.cuda.staging import CopyStream
from models.warm_model import WarmModel


def rerun(work: Work) -> Work:
    """A recording that works on any device: it does the work again."""
    return work


def graphed(warm: WarmModel, *, record: Record = rerun, best_batch: int = 8) -> WarmModel:
    """The same model with recorded passes from the first batch on."""
    card = structs.replace(warm.info.card, best_batch=best_batch)
    graphs = Graphs(record, dtype=warm.dtype, patience=0)
    return replace(warm, info=structs.replace(warm.info, card=card), graphs=graphs)


def on_gpu(warm: WarmModel, device: torch.device) -> WarmModel:
    """The same model on a CUDA device, with uploads and recorded passes."""
    moved = replace(
        warm,
        device=device,
        module=copy.deepcopy(warm.module).to(device),
        scale=warm.scale.to(device),
        shift=warm.shift.to(device),
        head=warm.head.to(device),
        uploads=CopyStream(device),
    )
    return graphed(moved, record=GraphRecorder(device))


@pytest.fixture
def cuda() -> torch.device:
    """The device of tests marked `gpu`, which are skipped where there is none."""
    return torch.device("cuda", torch.cuda.current_device())
