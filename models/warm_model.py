"""From a loaded model to a warm one: probed, on its device, and timed there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import numpy as np
import torch
from msgspec import structs
from torch import Tensor, nn

from models.methods.applicability import ModelFacts, supported_methods
from models.cuda.recorder import GraphRecorder
from models.cuda.graphs import Graphs
from models.cuda.staging import CopyStream, Ready, Uploads, stage
from models.errors import ModelLoadFailed
from models.head import HeadProbe, probe_head
from models.layers import (
    Layouts,
    choose_target_layer,
    feature_layers,
    find_layouts,
    has_gradient,
    layer_infos,
)
from models.methods.applicability import refusals
from models.preparation.precision import DTYPES
from models.preparation.optimise import Findings, optimise
from models.preparation.variant import Needs, Variant
from models.probe import Trace, probe_batch, trace
from models.sources import LoadedModel
from models.types import LayerInfo, ModelCard, ModelInfo, Preprocess, Task
from models.warmup import BATCH_SIZES, best_batch, measure_latencies

WARMUP_S = 1.5


@dataclass(frozen=True, kw_only=True, eq=False)
class WarmModel:
    """One model version, ready to answer on its device. Shared by all passes; nobody changes it.

    Attributes:
        name: catalog name.
        version: version of that model.
        module: eval mode, parameters frozen, channels_last, of `dtype`; (N, 3, H, W) → (N, outputs)
            scores. Every layer of it can be tapped and changed.
        variants: faster modules that give the same tensors at some of the layers, the fastest first.
        device: where the module is.
        dtype: dtype of its parameters and input.
        scale: (1, 3, 1, 1) float32 on the device; the input is pixel · scale + shift, for pixels
            0…255.
        shift: the same.
        task: how the module's output is read as scores.
        target_layer: name of the `auto` layer; None if no map of the model has a gradient.
        head: what follows the target layer.
        layouts: of every layer that is a map, by name; None = plain (N, C, h, w). Other layers are
            not in it.
        info: what the service tells about the model.
        uploads: how pictures reach the device; None where they need not.
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
    info: ModelInfo
    uploads: Uploads | None = None
    graphs: Graphs | None = None
    _layers: Mapping[str, LayerInfo] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_layers", {layer.name: layer for layer in self.info.layers})

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the module's input in pixels."""
        assert self.info.card.input is not None
        return self.info.card.input.crop

    @property
    def chunk(self) -> int:
        """Pictures that one pass of a long method should hold."""
        return self.info.card.best_batch

    def channels(self, layer: str) -> int | None:
        """Number of feature maps of a layer, its features if it is no map; None if it has no tensor output."""
        known = self._layers.get(layer)
        if known is None or not known.output_shape:
            return None
        last = self.layouts.get(layer) is not None or len(known.output_shape) == 2
        return known.output_shape[-1 if last else 0]

    def module_for(self, needs: Needs) -> nn.Module:
        """The fastest module for a pass with these needs."""
        return next((variant.module for variant in self.variants if variant.serves(needs)), self.module)

    def stage(self, pictures: Sequence[np.ndarray]) -> Ready:
        """Start to bring pictures, (H, W, 3) uint8 of the input's size, to the device as one batch."""
        return stage(pictures, self.uploads)

    def normalise(self, batch: Tensor) -> Tensor:
        """Turn pictures into the module's input.

        Args:
            batch: (N, H, W, 3) uint8 on any device.

        Returns:
            (N, 3, H, W) of `dtype` on the model's device, channels_last in memory.
        """
        pixels = batch.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        # One operation, seven times faster than a subtraction and a division of uint8 values.
        return torch.addcmul(self.shift, pixels, self.scale).to(self.dtype)


def prepare(loaded: LoadedModel, device: torch.device, *, warmup_s: float = WARMUP_S) -> WarmModel:
    """Probe a loaded model on the CPU, move it to its device, and time it there.

    The probes run in float32 on the CPU whatever the device and precision, so that the same model
    gets the same target layer, head and methods everywhere. The loaded module itself is moved.

    Raises:
        ModelLoadFailed: the configured target layer is none, or scores on the device are not
            finite.
    """
    spec = loaded.spec
    probe = probe_batch(loaded.preprocess)
    traced = trace(loaded.module, spec.task, probe)
    layouts = find_layouts(traced)
    target = _target_layer(spec.target_layer, traced, layouts)
    head = HeadProbe(kind="flatten")
    if target is not None:
        head = probe_head(
            loaded.module, target, layout=layouts[target], task=spec.task, probe=probe
        )
    facts = ModelFacts(
        target_layer=target,
        head=None if target is None else head.kind,
        closed_form=head.closed_form,
        refusals=refusals(loaded.module, traced, layouts, task=spec.task, probe=probe),
    )
    info = ModelInfo(
        card=_card(loaded, device, facts),
        labels=loaded.labels,
        layers=layer_infos(traced, layouts, target_layer=target),
    )

    def choose_features(fused: Variant | None) -> tuple[str, ...]:
        # Layers of the faster module, so that describing them costs no other pass.
        quick = {k: v for k, v in layouts.items() if fused is None or k in fused.readable}
        return feature_layers(traced, quick)

    findings = Findings(
        target_layer=target,
        layout=None if target is None else layouts[target],
        head=head,
        choose_features=choose_features,
    )
    prepared = optimise(loaded.module, probe, spec=spec, device=device, findings=findings)
    info = structs.replace(info, feature_layers=prepared.features)
    dtype = DTYPES[prepared.precision]
    graphs = _graphs(device, dtype) if spec.cuda_graphs else None
    steps = prepared.steps if graphs is None else (*prepared.steps, "CUDA graphs")
    card = structs.replace(info.card, precision=prepared.precision, preparation=steps)
    scale, shift = _normalisation(loaded.preprocess)
    warm = WarmModel(
        name=spec.name,
        version=spec.version,
        module=prepared.module,
        variants=prepared.variants,
        device=device,
        dtype=dtype,
        scale=scale.to(device),
        shift=shift.to(device),
        task=spec.task,
        target_layer=target,
        head=head.to(device),
        layouts=layouts,
        info=structs.replace(info, card=card),
        uploads=CopyStream(device) if device.type == "cuda" else None,
        graphs=graphs,
    )
    return _timed(warm, warmup_s)


def _graphs(device: torch.device, dtype: torch.dtype) -> Graphs | None:
    return Graphs(GraphRecorder(device), dtype=dtype) if device.type == "cuda" else None


def _target_layer(configured: str, traced: Trace, layouts: Layouts) -> str | None:
    if configured == "auto":
        return choose_target_layer(traced, layouts)
    if configured not in traced.calls:
        close = get_close_matches(configured, traced.calls, n=3)
        hint = f" Close names: {', '.join(close)}." if close else ""
        raise ModelLoadFailed(f"The model runs no layer named {configured}.{hint}")
    if configured not in layouts:
        raise ModelLoadFailed(f"The output of target_layer {configured} is no map of the picture.")
    if not has_gradient(traced, layouts, configured):
        raise ModelLoadFailed(f"The scores do not depend on the map at target_layer {configured}.")
    return configured


def _card(loaded: LoadedModel, device: torch.device, facts: ModelFacts) -> ModelCard:
    spec = loaded.spec
    return ModelCard(
        name=spec.name,
        version=spec.version,
        state="ready",
        ready=True,
        source=spec.source,
        devices=(str(device),),
        versions=(spec.version,),
        num_classes=loaded.num_classes,
        task=spec.task,
        input=loaded.preprocess,
        target_layer=facts.target_layer,
        head=facts.head,
        closed_form=facts.closed_form,
        methods=supported_methods(facts),
    )


def _normalisation(preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Scale and shift, (1, 3, 1, 1) each, with (pixel / 255 - mean) / std = pixel · scale + shift."""
    statistics = torch.tensor([preprocess.mean, preprocess.std], dtype=torch.float64)
    mean, std = statistics.view(2, 1, -1, 1, 1)
    return (1 / (255 * std)).float(), (-mean / std).float()


def _timed(warm: WarmModel, warmup_s: float) -> WarmModel:
    """Run the model by batch size, and return it with its latencies on the card."""
    generator = torch.Generator().manual_seed(0)
    shape = (max(BATCH_SIZES), *warm.input_size, 3)
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    @torch.inference_mode()
    def run(size: int) -> Tensor:
        output: Tensor = warm.module_for(Needs())(warm.normalise(pictures[:size]))
        return output

    if not bool(run(1).isfinite().all()):
        raise ModelLoadFailed(
            f"The model's scores are not finite on {warm.device} in {warm.info.card.precision}."
        )
    latency_ms = measure_latencies(run, warm.device, budget_s=warmup_s)
    card = structs.replace(warm.info.card, latency_ms=latency_ms, best_batch=best_batch(latency_ms))
    return replace(warm, info=structs.replace(warm.info, card=card))
