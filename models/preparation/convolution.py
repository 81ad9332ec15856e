"""A convolution with its batch-norm, activation and residual sum in one operation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

logger = logging.getLogger("heatlens.preparation")


@dataclass(frozen=True)
class Activation:
    """An activation as oneDNN names it, and as torch computes it."""

    attribute: str
    scalars: tuple[float, ...]
    apply: Callable[[Tensor], Tensor]


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module computes, if it can be fused."""
    functional = nn.functional
    kind = type(module).__name__
    if isinstance(module, nn.ReLU6):
        return Activation("hardtanh", (0.0, 6.0), functional.relu6)
    if isinstance(module, nn.ReLU):
        return Activation("relu", (), functional.relu)
    if isinstance(module, nn.Hardswish) or kind == "HardSwish":
        return Activation("hardswish", (), functional.hardswish)
    if isinstance(module, nn.SiLU) or kind in ("Swish", "SwishMe"):
        return Activation("swish", (), functional.silu)
    return None


@dataclass(frozen=True)
class _Packing:
    """A convolution prepared for inputs of one size.

    Attributes:
        weight: in oneDNN's layout.
        place: padding, stride, dilation and groups.
        pads: (left, right, top, bottom) that the input is padded by where oneDNN's padding fails.
    """

    weight: Tensor
    place: tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
    pads: tuple[int, int, int, int] | None


_Case = tuple[torch.Size, torch.dtype, bool]
"""Shape and dtype of an input, and whether it has a residual."""

_Run = Callable[[Tensor, Tensor | None], Tensor]
_PACKABLE = (torch.float32, torch.bfloat16)
RELU = Activation("relu", (), nn.functional.relu)


class FusedConv2d(nn.Module):
    """Convolution + folded batch-norm (+ residual) + activation.

    On the CPU without autograd it runs as one oneDNN operation on prepacked weights (the operation
    that `torch.compile` emits when it freezes a model); elsewhere, and where a graph is recorded,
    as plain torch operations on the folded weights.
    """

    def __init__(
        self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, activation: Activation | None
    ) -> None:
        """Fold, in float64; TensorFlow-like "same" padding is recognised by its class."""
        super().__init__()
        weight, bias = _folded(conv, norm)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.activation = activation
        self.same = type(conv).__name__ == "Conv2dSame"
        self.padding = (0, 0) if self.same else _pair(conv.padding)
        self.stride = _pair(conv.stride)
        self.dilation = _pair(conv.dilation)
        self.groups = conv.groups
        self.kernel = _pair(conv.kernel_size)
        self._packings: dict[tuple[int, int], _Packing] = {}
        self._runs: dict[_Case, _Run] = {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, H, W) → (N, K, h, w); `residual` is added before the activation."""
        # A graph may begin at either operand, at the residual alone where that layer is explained.
        recorded = torch.is_grad_enabled() and (
            x.requires_grad or (residual is not None and residual.requires_grad)
        )
        if recorded or not x.is_cpu:
            return self._run_plain(x, residual)
        # All that depends on the kind of input alone is done once: a small network's convolutions
        # take no longer than a few lines of Python.
        case = (x.shape, x.dtype, residual is None)
        run = self._runs.get(case)
        if run is None:
            self._runs[case] = run = self._prepared(x, residual)
        return run(x, residual)

    def _run_plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.same:
            x = nn.functional.pad(x, self._same_padding(x))
        out = nn.functional.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        if residual is not None:
            out = out + residual
        return out if self.activation is None else self.activation.apply(out)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast; the weights are packed again at the next use."""
        self._packings, self._runs = {}, {}
        # Torch's own method is not annotated.
        return cast("Self", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def _prepared(self, x: Tensor, residual: Tensor | None) -> _Run:
        """The fastest way to run inputs of a kind."""
        if torch.backends.mkldnn.is_available() and x.dtype in _PACKABLE:
            try:
                run = self._packed(x, residual)
                run(x, residual)
            except RuntimeError:
                # oneDNN has no kernel for some shapes and dtypes (small grouped bfloat16 sums).
                logger.warning("oneDNN does not run a convolution; torch does", exc_info=True)
            else:
                return run
        return self._run_plain

    def _packed(self, x: Tensor, residual: Tensor | None) -> _Run:
        size = (x.shape[2], x.shape[3])
        packing = self._packings.get(size)
        if packing is None:
            self._packings[size] = packing = self._pack(x)
        pads = packing.pads
        attribute, scalars = "none", list[float]()
        if self.activation is not None:
            attribute, scalars = self.activation.attribute, list(self.activation.scalars)
        place = (packing.weight, self.bias, *packing.place)
        # This operation has no public name.
        convolve = torch.ops.mkldnn._convolution_pointwise  # noqa: SLF001
        last: tuple[Any, ...]
        if residual is None:
            operation, last = convolve.default, (*place, attribute, scalars, "")
        else:
            unary = None if self.activation is None else attribute
            operation, last = convolve.binary, (*place, "add", 1.0, unary, scalars, "")

        def run(x: Tensor, residual: Tensor | None) -> Tensor:
            x = x if pads is None else nn.functional.pad(x, pads)
            operands = (x,) if residual is None else (x, residual)
            out: Tensor = operation(*operands, *last)
            return out

        return run

    def _pack(self, x: Tensor) -> _Packing:
        """Pack for an input's size, without which oneDNN guesses a slower layout of 3x3 layers."""
        padding, pads = self.padding, None
        weight: Tensor = self.weight
        if self.same:
            left, right, top, bottom = self._same_padding(x)
            padding = (bottom, right)
            if (left, top) == (right - 1, bottom - 1) and self.groups > 1:
                # One more pixel at the end equals even padding and a kernel that begins with zeros:
                # the wider kernel costs a grouped convolution less than a padded input does.
                weight = nn.functional.pad(weight, (1, 0, 1, 0))
            elif (left, top) != (right, bottom):
                pads, padding = (left, right, top, bottom), (0, 0)
        place = (padding, self.stride, self.dilation, self.groups)
        weight = weight.contiguous(memory_format=torch.channels_last)
        reorder = torch.ops.mkldnn._reorder_convolution_weight  # noqa: SLF001
        shape = list(x.shape if pads is None else nn.functional.pad(x, pads).shape)
        return _Packing(weight=reorder(weight, *place, shape), place=place, pads=pads)

    def _same_padding(self, x: Tensor) -> tuple[int, int, int, int]:
        """TensorFlow's "same" padding (left, right, top, bottom): the odd pixel goes to the end."""
        pads: list[int] = []
        for axis in (1, 0):
            size, stride = x.shape[2 + axis], self.stride[axis]
            reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            pads += [total // 2, total - total // 2]
        return pads[0], pads[1], pads[2], pads[3]


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    weight = conv.weight.detach().double()
    bias = torch.zeros(len(weight)) if conv.bias is None else conv.bias.detach()
    bias = bias.to(weight)
    if norm is not None:
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        scale = (variance.double() + norm.eps).rsqrt()
        shift = torch.zeros_like(scale)
        if norm.affine:
            scale = scale * norm.weight.detach().double()
            shift = norm.bias.detach().double()
        weight = weight * scale[:, None, None, None]
        bias = (bias - mean.double()) * scale + shift
    dtype = conv.weight.dtype
    return weight.to(dtype).contiguous(memory_format=torch.channels_last), bias.to(dtype)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
