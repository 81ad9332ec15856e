"""A model that is ready to answer: its modules, its device, and what its probes found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from models.cuda.graphs import Graphs
from models.cuda.staging import Ready, Uploads, stage
from models.head import HeadProbe
from models.layers import Layouts
from models.preparation.variant import Needs, Variant
from models.probe import largest_batch
from models.readout import PER_JOB, Read, readings
from models.texts import TextEncoder
from models.types import STEP_MS, Job, Kind, LayerInfo, ModelInfo, Preprocess, Task


@dataclass(frozen=True, kw_only=True, eq=False)
class WarmModel:
    """One model version, ready to answer on its device; shared by all passes and never changed.

    Attributes:
        name: catalog name.
        version: version of that model.
        module: eval mode, parameters frozen, channels_last, of `dtype`; (N, 3, H, W) → (N, outputs)
            scores. Every layer of it can be tapped and changed.
        variants: faster modules that give the same tensors at some of the layers, the fastest
            first.
        device: where the module is.
        dtype: dtype of its parameters and input.
        scale: (1, C, 1, 1) float32 on the device; the input is pixel · scale + shift, for pixels
            0…255.
        shift: the same.
        task: how the module's output is read as scores.
        target_layer: name of the `auto` layer; None if no map of the model has a gradient.
        head: what follows the target layer.
        layouts: of every layer that is a map, by name; None = plain (N, C, h, w). Other layers are
            not in it.
        input_layouts: the same of the layers' first inputs.
        other_inputs: layers whose first input has another first dimension than the image.
        texts: makes classes of texts, for a network whose output is vectors.
        info: what the service tells about the model.
        uploads: how images reach the device; None on the CPU.
        graphs: recorded passes; None where none are made.
    """

    name: str
    version: str
    module: nn.Module
    variants: tuple[Variant, ...] = ()
    device: torch.device
    dtype: torch.dtype
    scale: Tensor
    shift: Tensor
    task: Task
    target_layer: str | None
    head: HeadProbe
    layouts: Layouts
    input_layouts: Layouts = field(default_factory=dict)
    other_inputs: frozenset[str] = frozenset()
    texts: TextEncoder | None = None
    info: ModelInfo
    uploads: Uploads | None = None
    graphs: Graphs | None = None
    _layers: Mapping[str, LayerInfo] = field(init=False, repr=False)
    _row: tuple[Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_layers", {layer.name: layer for layer in self.info.layers})
        # Of whole rows: torch works through the few channels alone five times slower.
        rows = (t.flatten().repeat(self.input_size[1]) for t in (self.shift, self.scale))
        object.__setattr__(self, "_row", tuple(rows))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.info.card.num_classes

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the module's input in pixels."""
        return self._input.crop

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that jobs bring."""
        return (*self._input.crop, self._input.channels)

    @property
    def _input(self) -> Preprocess:
        assert self.info.card.input is not None
        return self.info.card.input

    @property
    def chunk(self) -> int:
        """Images that one pass of a long method should hold: the best batch that is a step."""
        card = self.info.card
        fitting = [n for n, ms in card.latency_ms.items() if n <= card.best_batch and ms <= STEP_MS]
        return max(fitting, default=1) if card.latency_ms else card.best_batch

    def channels(self, layer: str) -> int | None:
        """Number of a layer's feature maps, or of its features; None if it returns no tensor."""
        known = self._layers.get(layer)
        if known is None or not known.output_shape:
            return None
        last = self.layouts.get(layer) is not None or len(known.output_shape) == 2
        return known.output_shape[-1 if last else 0]

    def refusal(
        self, layer: str, *, spatial: bool = False, kinds: Sequence[Kind] = ()
    ) -> str | None:
        """Why a layer cannot be used, or not be explained if `spatial`, or not have those kinds read.

        None if it can.
        """
        known = self._layers.get(layer)
        if known is None:
            return "the model runs no such layer"
        if known.usable and layer in self.other_inputs and any(k.endswith("input") for k in kinds):
            return "the first dimension of its input is not the image"
        return None if known.usable and (known.spatial or not spatial) else known.reason

    def module_for(self, needs: Needs) -> nn.Module:
        """The fastest module for a pass with these needs."""
        return next((v.module for v in self.variants if v.serves(needs)), self.module)

    @property
    def largest_batch(self) -> int | None:
        """Most images whose layers can be read in one pass; None where there is no limit."""
        return largest_batch(self.module)

    @property
    def reads_per_job(self) -> bool:
        """Whether each job reads the output in its own way."""
        return self.task in PER_JOB or self.texts is not None

    def readings(self, jobs: Sequence[Job], output: Tensor) -> list[Read]:
        """How the output for each job's image is read; its labels are known."""
        texts = None if self.texts is None else self.texts.scores
        return readings(self.task, jobs, output, texts=texts)

    def stage(self, images: Sequence[np.ndarray]) -> Ready:
        """Start to bring inputs of jobs, all of one kind, to the device as a batch."""
        return stage(images, self.uploads)

    def normalise(self, batch: Tensor, *, module: nn.Module | None = None) -> Tensor:
        """Turn images, (N, H, W, C) uint8 on any device, into the input of one of the modules.

        That is (N, C, H, W) on the model's device, channels_last in memory, of `dtype` or what the
        module takes. A batch of floating point is normalised already.
        """
        dtype: torch.dtype = getattr(module, "input_dtype", self.dtype)
        images = batch.to(self.device, non_blocking=True)
        if images.is_floating_point():
            return images.to(dtype, memory_format=torch.channels_last)
        if self._input.order == "bgr":
            images = images.flip(3)
        # One operation: uint8 values are slow to subtract from and to divide.
        shifts, scales = self._row
        rows = torch.addcmul(shifts, images.flatten(2), scales).to(dtype)
        return rows.view(images.shape).permute(0, 3, 1, 2)
