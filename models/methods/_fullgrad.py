"""The full-gradient decomposition of a score into the parts of the input and of every bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from models.extractor import Extractor, Tap
from models.probe import Trace
from models.proof import Proofs
from models.steps import Subject
from models.targets import ResolvedTarget, ScoreWeights
from models.types import Kind


@dataclass(frozen=True)
class Decomposition:
    """What a score is made of.

    Attributes:
        maps: float32 (n, H, W), FullGrad's sum over all parts that have a place.
        total: float32 (n,), sum of x * dx y and of all b * g, those of linear layers included. For
            networks that are linear piece by piece and whose pieces pass through zero (ReLU, max
            pooling) it is the score itself.
        scores: float32 (n,), the scores.
    """

    maps: Tensor
    total: Tensor
    scores: Tensor


@dataclass(frozen=True)
class _Place:
    """A bias, the module that holds it, and the tensor to which it is added, where it is tapped."""

    holder: str
    layer: str
    kind: Kind
    bias: Tensor
    channels_last: bool


_KEEPS_PLACES = (
    *("Convolution", "NativeBatchNorm", "CudnnBatchNorm", "Clone", "Add", "Mul"),
    *(
        "Relu",
        "Hardtanh",
        "LeakyRelu",
        "Elu",
        "Gelu",
        "Silu",
        "Hardswish",
        "Hardsigmoid",
        "Sigmoid",
    ),
    *("MaxPool2D", "AvgPool2D", "AdaptiveAvgPool2D", "ConstantPadNd"),
)
"""Operations on (N, C, h, w) that leave rows rows and columns columns, in their order."""


def misplaced(traced: Trace, proofs: Proofs) -> str | None:
    """Why the biases of a model have no place in the image, as a clause; None if all have.

    Gradients at a bias must belong to one image each, and lie in it as maps of channels first: the
    layer is proved to be one, or nothing between it and such layers moves positions. That its
    positions respond to the image elsewhere, as within small blocks they may, is no obstacle.
    """
    biased = {place.holder for place in _places(traced.module)}
    upright = {
        call.output.grad_fn
        for name, call in traced.calls.items()
        if call.output is not None and proofs[name].spatial and proofs[name].layout is None
    }
    for name, call in traced.calls.items():
        if call.path not in biased or call.output is None:
            continue
        proof, shape = proofs[name], call.output.shape
        if not proof.usable:
            return f"its layer {name} has a bias, and {proof.reason}"
        placed = proof.spatial and proof.layout is None
        placed = placed or _lies_as(call.output.grad_fn, upright)
        if len(shape) == 4 and shape[2] * shape[3] > 1 and not placed:
            return f"its layer {name} has a bias, and {proof.reason or 'its channels come last'}"
    return None


def _lies_as(made: Node | None, upright: set[Node | None]) -> bool:
    """Whether what a node made lies as the image does, or as the values of `upright` nodes do."""
    nodes, seen = [made], set(upright)
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        keeps = name.startswith(_KEEPS_PLACES) or name.endswith("AccumulateGrad")
        keeps = keeps or (name == "CatBackward0" and getattr(node, "_saved_dim", None) == 1)
        # A mean, if it leaves one row, column or channel in place of all.
        if not keeps and not getattr(node, "_saved_keepdim", False):
            return False
        nodes += [before for before, _ in node.next_functions]
    return made is not None


def obstacle(module: nn.Module) -> str | None:
    """Why a model's biases cannot all be accounted for; None if they can.

    Known are the biases of convolutions and linear layers and the implicit ones of batch-norms.
    """
    for child in module.modules():
        biased = any("bias" in name for name, _ in child.named_parameters(recurse=False))
        if biased and not isinstance(child, (_ConvNd, nn.Linear, _BatchNorm)):
            kind = type(child).__name__
            return (
                f"it needs every bias in a convolution, linear layer or batch-norm; {kind} has one"
            )
    return None


def decomposed_maps(subject: Subject, targets: Sequence[ResolvedTarget]) -> Tensor:
    """FullGrad's maps (n, H, W) for n targets."""
    return decompose(subject, targets).maps


def decompose(subject: Subject, targets: Sequence[ResolvedTarget]) -> Decomposition:
    """Decompose the scores of n targets by one pass of n copies of the image and one backward pass.

    Gradients are reduced as they appear, so that memory is that of the pass.
    """
    inputs = subject.inputs.expand(len(targets), -1, -1, -1)
    leaf = inputs.clone(memory_format=torch.channels_last).requires_grad_()
    parts = _Parts(len(targets), leaf)
    taps = [
        Tap(place.layer, place.kind, parts.taker(place), shares_memory=False)
        for place in _places(subject.module)
    ]
    changes = subject.changes(len(targets))
    with Extractor(subject.module, taps, changes=changes, tensor_hooks_only=True) as extractor:
        # Not the leaf itself: a model may work on its input in place.
        scores, _ = subject.read(extractor.forward(leaf.clone(), graph=True))
        weights = ScoreWeights([[target] for target in targets], scores.device)
        chosen = weights.of(scores)[:, 0]
        (gradient,) = torch.autograd.grad(chosen.sum(), leaf)
    parts.add(gradient.float() * leaf.detach().float())
    return Decomposition(parts.maps, parts.total, chosen.detach())


class _Parts:
    """Sums of the parts seen so far."""

    def __init__(self, count: int, inputs: Tensor) -> None:
        self.maps = torch.zeros(count, *inputs.shape[-2:], device=inputs.device)
        self.total = torch.zeros(count, device=inputs.device)

    def taker(self, place: _Place) -> Callable[[Tensor], None]:
        """What a tap calls with the gradient at a place, once for each call of a shared module."""

        def take(gradient: Tensor) -> None:
            if place.channels_last:
                self.total += (gradient.float() * place.bias).flatten(1).sum(1)
            else:
                shape = (1, -1, *[1] * (gradient.ndim - 2))
                self.add(gradient.float() * place.bias.view(shape))

        return take

    def add(self, part: Tensor) -> None:
        """Add a part (n, channels, h, w), or (n, channels) which has no place."""
        self.total += part.flatten(1).sum(1)
        if part.ndim == 4:
            rescaled = _unit(part.abs()).sum(1, keepdim=True)
            self.maps += nn.functional.interpolate(
                rescaled, self.maps.shape[-2:], mode="bilinear", align_corners=False
            )[:, 0]


def _unit(magnitudes: Tensor) -> Tensor:
    """Scaled to [0, 1] by the least and greatest value of each image; 0 if these are equal."""
    low = magnitudes.amin((1, 2, 3), keepdim=True)
    span = magnitudes.amax((1, 2, 3), keepdim=True) - low
    return (magnitudes - low) / torch.where(span > 0, span, torch.inf)


def _places(module: nn.Module) -> list[_Place]:
    """Every bias of a model and where it is added."""
    places = []
    kind: Kind
    for name, child in module.named_modules():
        if isinstance(child, _BatchNorm):
            bias = _implicit_bias(child)
            layer, kind = name, "grad_output"
            # timm's batch-norms hold an activation: its input is the normalised tensor.
            for inner, _ in child.named_children():
                layer, kind = f"{name}.{inner}", "grad_input"
                break
        elif isinstance(child, (_ConvNd, nn.Linear)):
            bias, layer, kind = child.bias, name, "grad_output"
        else:
            continue
        if bias is not None:
            last = isinstance(child, nn.Linear)
            places.append(_Place(name, layer, kind, bias.detach().float(), last))
    return places


def _implicit_bias(norm: _BatchNorm) -> Tensor | None:
    """What a batch-norm adds to gamma / sqrt(var + eps) times its input.

    None if it normalises by the statistics of its input.
    """
    if norm.running_mean is None or norm.running_var is None:
        return None
    mean, variance = norm.running_mean.float(), norm.running_var.float()
    bias = -mean * (variance + norm.eps).rsqrt()
    if not norm.affine:
        return bias
    return norm.bias.detach().float() + norm.weight.detach().float() * bias
