"""What a job costs, estimated from its options before anything is decoded. No torch here.

Device time is the model's measured pass times the passes that the options ask for, plus what taps,
statistics and methods do to tensors of known size. `benchmarks/price.py` compares the estimate
with what jobs then cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from models.methods import METHODS
from models.methods.table import Method, images_of
from models.shares import LONG_SHARE
from models.types import (
    STEP_BYTES,
    STEP_MS,
    JobOptions,
    LayerInfo,
    ModelInfo,
    Operation,
    Struct,
)

_PATIENCE = 2.0

_UNKNOWN_MS = 10.0
# The module that can be tapped and differentiated anywhere, over the one prepared for speed.
_PLAIN = 1.45
# A backward pass, over the forward pass of that module through the same layers.
_BACKWARD = 1.65
# One target's gradient through all layers and what is done with it, over a plain prediction.
_ONE_TARGET = 1.25 * (_PLAIN - 1 + _PLAIN * _BACKWARD)
# A gradient at the pixels, in images.
_GRADIENT = _PLAIN * (1 + 0.8 * _BACKWARD)
# Work for each value that a layer puts out, in multiplications.
_VALUE_WORK = 48

# Nanoseconds for each value of a tensor, float32 on one core.
_KEEP_NS = 1.0
_REDUCE_NS = 2.0
_TAP_NS = 8.0
_METHOD_NS = 1.2
_CLOSED_NS = 0.2
_FEM_NS = 8.0
# Nanoseconds for each multiplication of matrices in double precision.
_PRODUCT_NS = 0.1
_EIGENVECTORS_NS = 0.2
# Milliseconds for each tensor that is described, and for each map.
_DESCRIBE_MS = 0.25
_MAP_MS = 0.06

_KPCA_SIDE = 28
# Images that a measure of faithfulness runs for each map; those of ROAD are imputed, which takes longer.
_MEASURED = {"deletion": 56, "insertion": 56, "road": 8 * 5, "average_drop": 1, "increase": 1}
_STATISTIC_BYTES = 600
_CHANNEL_BYTES = 50


class Price(Struct):
    """What a job is expected to cost.

    Attributes:
        device_ms: time of all its passes on a device of its own.
        extra_ms: what it adds to its first batch, over a plain prediction.
        long: whether it takes steps after its first batch.
        device_bytes: memory for the tensors of its largest step, and for the results it gathers.
        maps: explanations of the image.
        result_bytes: maps and statistics that come back from the device.
    """

    device_ms: float = 10.0
    extra_ms: float = 0.0
    long: bool = False
    device_bytes: int = 0
    maps: int = 0
    result_bytes: int = 0

    def patience_s(self, max_wait_s: float) -> float:
        """The longest wait with which it is accepted, where most jobs have this limit.

        A long job may wait for twice as long as it takes itself with its share of a device: it has
        a deadline to match, and would hardly ever be accepted beside another one.
        """
        taken_s = self.device_ms / 1000 / LONG_SHARE
        return max(max_wait_s, _PATIENCE * taken_s) if self.long else max_wait_s


def price(operation: Operation, options: JobOptions, info: ModelInfo) -> Price:
    """Price a job whose options are resolved against the model.

    Of a comparison this is the price of each image.
    """
    operation = "explain" if operation == "compare" else operation
    work = _Work(operation, options, info)
    further_ms, is_cut = work.further_ms, work.exceeds_step
    first_ms = work.first_ms + (work.repeats_ms if is_cut else 0.0)
    graph_bytes = 4 * work.after[1]
    return Price(
        device_ms=work.forward_ms + first_ms + further_ms,
        extra_ms=0.0 if is_cut else first_ms,
        long=is_cut or further_ms > 0,
        device_bytes=min(work.kept_bytes, STEP_BYTES) + graph_bytes + work.result_bytes,
        maps=sum(number for number, _ in work.maps()),
        result_bytes=work.result_bytes,
    )


def exceeds_step(operation: Operation, options: JobOptions, info: ModelInfo) -> bool:
    """Whether the first pass of a job is more than one step should be."""
    return _Work(operation, options, info).exceeds_step


def images(operation: Operation, options: JobOptions, info: ModelInfo) -> int:
    """The number of plain predictions that a job is worth."""
    work = _Work(operation, options, info)
    return math.ceil(price(operation, options, info).device_ms / work.forward_ms)


def first_images(operation: Operation, options: JobOptions, info: ModelInfo) -> int:
    """The number of plain predictions that the first pass of a job is worth."""
    work = _Work(operation, options, info)
    return 1 + math.ceil(work.first_ms / work.forward_ms)


@dataclass(frozen=True)
class _Work:
    """A job, and the numbers that its price is made of."""

    operation: Operation
    options: JobOptions
    info: ModelInfo

    @cached_property
    def forward_ms(self) -> float:
        """An image's part of the best batch."""
        card = self.info.card
        latency_ms = card.latency_ms.get(card.best_batch, _UNKNOWN_MS)
        return max(1e-3, latency_ms / max(1, card.best_batch))

    @cached_property
    def layers(self) -> list[LayerInfo]:
        wanted = set(self.options.layers)
        return [layer for layer in self.info.layers if layer.name in wanted]

    @cached_property
    def targets(self) -> int:
        return max(1, len(self.options.targets))

    @cached_property
    def methods(self) -> list[Method]:
        names = self.options.methods if self.operation == "explain" else ()
        return [METHODS[name] for name in names if name in METHODS]

    @property
    def gradients(self) -> int:
        """Gradients of each layer, for each target."""
        if self.operation == "features":
            return sum(kind.startswith("grad_") for kind in self.options.kinds)
        return int(any(m.needs_gradients and not m.of_input for m in self.methods))

    def is_linear(self, layer: LayerInfo) -> bool:
        """Whether the gradient at a layer is a row of the head's weights."""
        card = self.info.card
        closed = card.closed_form and not self.options.interventions
        return closed and self.operation == "explain" and layer.name == card.target_layer

    @cached_property
    def after(self) -> tuple[float, int]:
        """Share of the forward's work after the earliest layer to differentiate, and its values."""
        names = {layer.name for layer in self.layers if not self.is_linear(layer)}
        return _share_after(self.info, names) if self.gradients and names else (0.0, 0)

    @property
    def exceeds_step(self) -> bool:
        # Of a slow model, one target's pass forward and back is a step, however many layers are
        # looked at on the way: divided by layers, every part would take as long.
        limit_ms = max(STEP_MS, _ONE_TARGET * self.info.card.latency_ms.get(1, 0.0))
        return self.first_ms > limit_ms or self.kept_bytes > STEP_BYTES

    # ---------------------------------------------------------------- the first pass

    @cached_property
    def first_ms(self) -> float:
        """Time of the first pass over a plain prediction."""
        images = _PLAIN - 1 if self._is_plain else 0.0
        images += self.targets * _PLAIN * _BACKWARD * self.after[0]
        if "grad_input" in self.options.kinds:
            # Of a network that works in place the pass is made twice.
            images += _PLAIN
        tensors_ms = sum(map(self._layer_ms, self.layers))
        if self.gradients and self.layers:
            # Where the graph is tapped at many layers, each of its tensors is handed on as a copy.
            sizes = [math.prod(layer.output_shape) for layer in self.layers]
            tensors_ms += _TAP_NS / 1e6 * (sum(sizes) - max(sizes))
        changes_ms = _KEEP_NS / 1e6 * self._changed_values
        return images * self.forward_ms + tensors_ms + changes_ms

    @cached_property
    def kept_bytes(self) -> int:
        """Memory for what the first pass keeps: maps and their gradients."""
        return 4 * sum(map(self._kept_values, self.layers))

    @property
    def repeats_ms(self) -> float:
        """Time that is lost when the first pass is cut into parts, which share no work."""
        parts = max(self.first_ms / STEP_MS, self.kept_bytes / STEP_BYTES)
        images = _PLAIN * (2 if "grad_input" in self.options.kinds else 1)
        # As many parts as targets divide the backward passes among them; more of them repeat some.
        backward = parts / self.targets - 1
        if backward > 0:
            images += _PLAIN * _BACKWARD * self.after[0] * backward / 2
        return max(0.0, parts - 1) * images * self.forward_ms

    @property
    def _is_plain(self) -> bool:
        """Whether the pass needs the module that can be tapped anywhere."""
        fused = {*self.info.feature_layers, self.info.card.target_layer}
        named = {layer.name for layer in self.layers} | {
            c.layer for c in self.options.interventions
        }
        return bool(self.after[0]) or not named <= fused

    def _layer_ms(self, layer: LayerInfo) -> float:
        size, options = math.prod(layer.output_shape), self.options
        features = self.operation == "features"
        tensors = self._tensors if features else int(options.statistics)
        ms = tensors * (_DESCRIBE_MS + _REDUCE_NS / 1e6 * size)
        ms += _KEEP_NS / 1e6 * self._kept_values(layer)
        return ms + sum(self._map_ms(method, layer) for method in self.methods)

    def _kept_values(self, layer: LayerInfo) -> int:
        size = math.prod(layer.output_shape)
        if self.operation == "features":
            return size * self._tensors if self.options.grid else 0
        if all(method.of_input for method in self.methods):
            return 0
        gradients = 0 if self.is_linear(layer) else self.gradients * self.targets
        return size * (1 + gradients)

    @property
    def _tensors(self) -> int:
        """Tensors of a layer that features describe."""
        return len(self.options.kinds) + self.gradients * (self.targets - 1)

    @property
    def _changed_values(self) -> int:
        names = [change.layer for change in self.options.interventions]
        sizes = {layer.name: math.prod(layer.output_shape) for layer in self.info.layers if names}
        return sum(sizes.get(name, 0) for name in names)

    def _map_ms(self, method: Method, layer: LayerInfo) -> float:
        """Time for the maps of one layer by a method that needs nothing but the first pass."""
        if method.cost not in ("pass", "head"):
            return 0.0
        size, positions = math.prod(layer.output_shape), _positions(layer)
        channels, times = size // max(1, positions), self.targets if method.needs_gradients else 1
        if method.name == "kpca_cam":
            height, width = layer.output_shape[-2:] if layer.spatial else (positions, 1)
            return _decomposition_ms(min(height, _KPCA_SIDE) * min(width, _KPCA_SIDE), channels)
        if method.name in ("eigencam", "eigengradcam"):
            ms = _decomposition_ms(*sorted((channels, positions)))
        else:
            nanoseconds = _CLOSED_NS if self.is_linear(layer) else _METHOD_NS
            ms = (_FEM_NS if method.name == "fem" else nanoseconds) / 1e6 * size
        return times * (ms + _MAP_MS)

    # ---------------------------------------------------------------- further passes

    @cached_property
    def further_ms(self) -> float:
        """Time of the passes after the first one."""
        images = sum(
            _passes(method, self, layer)
            for method in self.methods
            if method.cost in ("passes", "many")
            for layer in self._sites(method)
        )
        return images * self.forward_ms + self._measured_ms

    def _sites(self, method: Method) -> Sequence[LayerInfo | None]:
        return (None,) if method.of_input else self.layers

    @property
    def _measured_ms(self) -> float:
        """Time of the measures of faithfulness, of every map and of random ones."""
        names = set(self.options.faithfulness)
        if len(names & {"average_drop", "increase"}) == 2:
            names.remove("increase")
        images = sum(_MEASURED.get(name, 1) for name in names)
        maps = list(self.maps())
        return (
            images
            * (sum(n for n, _ in maps) + len({size for _, size in maps}))
            * (1.1 * self.forward_ms + 0.4)
        )

    # ---------------------------------------------------------------- results

    def maps(self) -> Iterator[tuple[int, int]]:
        """Maps that come back: how many, and of how many values each."""
        card = self.info.card
        pixels = math.prod(card.input.crop) if card.input is not None else 0
        for method in self.methods:
            if method.of_input:
                yield self.targets, pixels
            elif self.options.fuse != "none" and self.layers:
                yield self.targets, max(map(_positions, self.layers))
            else:
                yield from ((self.targets, _positions(layer)) for layer in self.layers)

    @cached_property
    def result_bytes(self) -> int:
        """Maps and statistics of the image."""
        total = sum(4 * n * size for n, size in self.maps())
        for layer in self.layers:
            tensors = self._tensors if self.operation == "features" else self.options.statistics
            size, positions = math.prod(layer.output_shape), _positions(layer)
            listed = min(self.options.channels, size // max(1, positions))
            drawn = 4 * positions if self.options.grid else 0
            total += tensors * (_STATISTIC_BYTES + listed * (_CHANNEL_BYTES + drawn))
        return total


def _passes(method: Method, work: _Work, layer: LayerInfo | None) -> float:
    """Passes of a method after the first one, in images of the model prepared for speed."""
    options, targets = work.options, work.targets
    channels, share = 0, 1.0
    if layer is not None:
        if work.is_linear(layer) and method.name in _LINEAR:
            return 0.0
        channels = math.prod(layer.output_shape) // max(1, _positions(layer))
        share = _share_after(work.info, {layer.name})[0]
    images = images_of(
        method, samples=options.samples, steps=options.steps, targets=targets, channels=channels
    )
    if method.name in ("smooth_gradcam_plus_plus", "finercam"):
        # Only what follows the layer is differentiated.
        return images / (3 * targets) * _PLAIN * (1 + _BACKWARD * share * targets)
    if method.name == "shapleycam":
        return targets * (_PLAIN + 4 + 28 * share)
    if method.name == "ablationcam":
        return images * 1.25 * (share + 1 / max(1, work.info.card.best_batch))
    return images * (_GRADIENT / 3 if method.needs_gradients else 1.0)


_LINEAR = ("smooth_gradcam_plus_plus", "finercam", "shapleycam", "ablationcam")
"""Methods that need no further pass where the gradient is a row of the head's weights."""


def _share_after(info: ModelInfo, names: set[str]) -> tuple[float, int]:
    """Share of the forward's work after the first of these layers, and the values there."""
    before = work = values = 0.0
    waiting = True
    for layer in _leaves(info.layers):
        size = math.prod(layer.output_shape)
        work += layer.parameters * _positions(layer) + _VALUE_WORK * size
        values += size
        if waiting and (layer.name in names or _is_inside(layer.name, names)):
            # The end of a block is where its first layer begins, or later.
            waiting, before, values = False, work, 0.0
    return (1 - before / work if work else 1.0), int(values)


def _is_inside(name: str, blocks: Iterable[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _decomposition_ms(side: int, other: int) -> float:
    """Time for the first eigenvector of the Gram matrix, of this side, of a matrix."""
    return (_PRODUCT_NS * side * side * other + _EIGENVECTORS_NS * side**3) / 1e6


def _leaves(layers: Sequence[LayerInfo]) -> Iterator[LayerInfo]:
    """Layers that contain no other."""
    inner = {layer.name.rpartition(".")[0] for layer in layers}
    return (layer for layer in layers if layer.name not in inner)


def _positions(layer: LayerInfo) -> int:
    """Positions of a layer's output: of a map its pixels, of tokens their number."""
    shape = layer.output_shape
    if len(shape) == 3:
        channels_last = shape[0] == shape[1] != shape[2]
        return shape[0] * shape[1] if channels_last else shape[1] * shape[2]
    return shape[0] if len(shape) == 2 else 1
