"""The faster twin of a model, and the proof that it gives the same answers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.hooks import HookStack
from models.preparation.fusion import fuse_convolutions

TOLERANCE = 1e-4
"""Largest difference of a layer's float32 tensor from the original's, relative to its largest value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Twin:
    """A module that answers like the original, faster.

    Attributes:
        module: the twin; eval mode, parameters frozen.
        layers: names of the layers whose outputs were found equal to the original's, so that they can be tapped
            or changed here; passes that need another layer run on the original.
        fused: number of convolutions that do more than convolve.
    """

    module: nn.Module
    layers: frozenset[str]
    fused: int

    def serves(self, layers: Iterable[str]) -> bool:
        """Whether a pass that taps or changes these layers can run here."""
        return self.layers.issuperset(layers)


def fused_twin(module: nn.Module, probe: Tensor) -> Twin | None:
    """Make a twin with fused convolutions and check it against the original, in float32.

    Args:
        module: the original, in eval mode, float32; left as it is.
        probe: (N, 3, H, W) normalised, on the module's device, of the size that will be served.

    Returns:
        The twin, or None where nothing could be fused or the scores differ by more than `TOLERANCE`.
    """
    try:
        twin, fused = fuse_convolutions(copy.deepcopy(module))
        if not fused:
            return None
        expected, found = _outputs(module, probe), _outputs(twin, probe)
    except Exception:  # noqa: BLE001  (a model that cannot be rewritten is served as it is)
        return None
    if not _close(found[""], expected[""]):
        return None
    same = [n for n, out in found.items() if n in expected and _close(out, expected[n])]
    return Twin(module=twin, layers=frozenset(same) - {""}, fused=fused)


def _outputs(module: nn.Module, probe: Tensor) -> dict[str, Tensor]:
    """Outputs by layer name, the scores under the empty name; layers called more than once are left out."""
    outputs: dict[str, Tensor | None] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            single = isinstance(output, Tensor) and name not in outputs
            # A copy: successors may work in place.
            outputs[name] = output.clone() if single else None

        return hook

    with torch.inference_mode(), HookStack() as hooks:
        for name, child in module.named_modules():
            if name:
                hooks.forward(child, record(name))
        outputs[""] = module(probe)
    return {name: output for name, output in outputs.items() if output is not None}


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= TOLERANCE * expected.float().abs().max())
