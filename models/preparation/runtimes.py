"""Which runtime serves a network on a CPU: the one whose passes take less time there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor, nn

from models.catalog import Runtime
from models.errors import ModelLoadFailed
from models.preparation.openvino import installed, openvino_variants
from models.preparation.race import Race, pass_ms, processor, race, reading
from models.preparation.replay import Reference, Refused
from models.preparation.variant import Needs, Variant
from models.proof_cache import ProofCache
from models.types import Precision

SMALL_MS = 2.0
"""A network whose passes take less is not worth a trial."""

_ABSENT = (
    'runtime = "openvino" needs the package openvino, which is not installed. Install it: '
    "pip install 'heatlens[openvino]'; or set runtime = \"auto\"."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ByTorch:
    """What a runtime competes with.

    Attributes:
        module: the model itself, in the precision in which it is served.
        variants: its faster variants.
        features: layers that are described by default.
        images: (N, 3, H, W) of the model's dtype.
    """

    module: nn.Module
    variants: Sequence[Variant]
    features: Sequence[str]
    images: Tensor


class Trial:
    """Whether OpenVINO serves a model, too: as its entry asks, or as times tell.

    Attributes:
        steps: what was found, for the model card.
    """

    def __init__(self, runtime: Runtime, cache: ProofCache, *, precision: Precision) -> None:
        """Args: the runtime asked for, what is known of the model, and its precision."""
        self.steps: list[str] = []
        self._runtime = runtime
        self._cache = cache
        self._precision = precision
        self._races: list[Race] | None = None

    def wanted(self, device: torch.device) -> bool:
        """Whether OpenVINO is asked for, or can be tried.

        Raises:
            ModelLoadFailed: it is asked for, and is not installed.
        """
        possible = device.type == "cpu" and installed()
        if self._runtime == "openvino" and device.type == "cpu" and not possible:
            raise ModelLoadFailed(_ABSENT)
        return self._runtime == "openvino" or (self._runtime == "auto" and possible)

    def check_worth(self, module: nn.Module, image: Tensor) -> None:
        """Check that a trial may be worth its time.

        Raises:
            Refused: it was not before, or the network is small.
        """
        if self._runtime != "auto":
            return
        self._races = self._cache.recall(self._times(), list[Race])
        if self._races is None and pass_ms(module, image) < SMALL_MS:
            raise Refused(f"a pass takes less than {SMALL_MS:g} ms")
        if self._races and not self._races[0].won:
            raise Refused(f"not clearly faster, {self._races[0]}")

    def variants(self, module: nn.Module, reference: Reference) -> tuple[list[Variant], Precision]:
        """Variants by OpenVINO, all proved, and the precision that they compute in.

        Raises:
            Refused: there are none.
        """
        variants, served = openvino_variants(
            module, reference, precision=self._precision, cache=self._cache
        )
        if served != self._precision:
            reason = f"OpenVINO has no {self._precision} on this CPU"
            if self._runtime == "auto":
                raise Refused(reason)
            self.steps.append(f"{served} instead of {self._precision}: {reason}")
        return variants, served

    def faster(self, replays: Sequence[Variant], torch_: ByTorch) -> list[Variant]:
        """Those of the variants that are to serve: all that were asked for, or the faster ones.

        The first is of the target layer alone, the second of inner layers, too.
        """
        chosen = list(replays)
        if self._runtime == "auto":
            races = self._races or self._measured(replays, torch_)
            # Where the first lost, the second would take passes from torch that need no inner layer.
            chosen = [v for v, r in zip(replays, races, strict=False) if r.won and races[0].won]
            self.steps += [
                f"{v.step}: {r}" if v in chosen else f"{v.step} skipped: not clearly faster, {r}"
                for v, r in zip(replays, races, strict=False)
            ]
        else:
            self.steps += [variant.step for variant in replays]
        if chosen:
            weights = sum(p.nbytes for p in torch_.module.parameters())
            self.steps.append(
                f"OpenVINO holds {len(chosen) * weights / 1e6:.0f} MB of weights besides, "
                f"{weights / 1e6:.0f} more for each graph of single images"
            )
        return chosen

    def _measured(self, replays: Sequence[Variant], torch_: ByTorch) -> list[Race]:
        """Times of plain passes, then of those that describe layers."""
        races: list[Race] = []
        for replay, layers in zip(replays, ((), torch_.features), strict=False):
            read = frozenset(layers) & replay.readable
            ours = (v.module for v in torch_.variants if v.serves(Needs(reads=read)))
            module = next(ours, torch_.module)
            passes = reading(module, sorted(read)), reading(replay.module, sorted(read))
            races.append(race(*passes, torch_.images))
            if not races[0].won:
                break
        self._cache.keep(self._times(), races)
        return races

    def _times(self) -> str:
        """Under which name times are kept."""
        place = processor(torch.device("cpu"))
        return f"single images, {place}, {self._precision}, OpenVINO {version('openvino')}"
