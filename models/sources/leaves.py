"""Turns layers of exported networks back into the modules of torch that they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.unflatten import InterpreterModule

_aten = torch.ops.aten
_CONV2D = (None, None, (1, 1), (0, 0), (1, 1), 1)
"""Arguments of a convolution that is written without them."""


def restore_layers(module: nn.Module) -> None:
    """Put torch's own module in place of each layer that is one operation.

    What finds convolutions, normalisations and linear layers by their type then finds them in an
    exported network, too. Weights are shared with the graph, not copied.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, InterpreterModule) and (layer := _layer(child)) is not None:
                setattr(parent, name, layer.eval())


def _layer(child: InterpreterModule) -> nn.Module | None:
    nodes = list(child.graph.nodes)
    calls = [node for node in nodes if node.op == "call_function"]
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len(calls) != 1 or len(inputs) != 1 or any(node.op == "call_module" for node in nodes):
        return None
    make = _LAYERS.get(calls[0].target)
    if make is None or calls[0].args[:1] != (inputs[0],):
        return None
    try:
        return make(*(_value(child, argument) for argument in calls[0].args[1:]))
    # An operation with other arguments than the module has stays as it is.
    except (TypeError, ValueError):
        return None


def _value(child: nn.Module, argument: Any) -> Any:
    """An argument of the operation: a tensor of the layer, or a plain value."""
    if not isinstance(argument, fx.Node):
        return argument
    if argument.op != "get_attr":
        raise ValueError("an argument that is computed")
    return getattr(child, str(argument.target))


def _conv2d(*given: Any) -> nn.Module:
    arguments: list[Any] = [*given, *_CONV2D[len(given) :]]
    weight, bias, stride, padding, dilation, groups = arguments
    out, depth, *kernel = weight.shape
    made = nn.Conv2d(
        depth * groups,
        out,
        _two(kernel),
        stride=_two(stride),
        padding=padding if isinstance(padding, str) else _two(padding),
        dilation=_two(dilation),
        groups=groups,
        bias=bias is not None,
        device="meta",
    )
    return _with(made, weight=weight, bias=bias)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return _with(made, weight=weight, bias=bias)


def _batch_norm(*given: Any) -> nn.Module:
    weight, bias, mean, variance, training, momentum, eps = given[:7]
    if training:
        raise ValueError("not the form that is served")
    made = nn.BatchNorm2d(
        len(mean), eps=eps, momentum=momentum, affine=weight is not None, device="meta"
    )
    return _with(made, weight=weight, bias=bias, running_mean=mean, running_var=variance)


def _layer_norm(
    shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> nn.Module:
    made = nn.LayerNorm(
        list(shape),
        eps=eps,
        elementwise_affine=weight is not None,
        bias=bias is not None,
        device="meta",
    )
    return _with(made, weight=weight, bias=bias)


def _max_pool(
    kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> nn.Module:
    return nn.MaxPool2d(
        _two(kernel), _two(stride or kernel), _two(padding), _two(dilation), ceil_mode=ceil_mode
    )


def _two(value: Any) -> Any:
    """A pair, which operations write as one value where both are the same."""
    if isinstance(value, int):
        return value, value
    return tuple(value) * 2 if len(value) == 1 else tuple(value)


def _with(made: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """A module with these tensors for its own."""
    parameters = dict(made.named_parameters())
    for name, tensor in tensors.items():
        if tensor is not None and name in parameters:
            made.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        elif tensor is not None:
            made.register_buffer(name, tensor)
    if hasattr(made, "num_batches_tracked"):
        made.register_buffer("num_batches_tracked", torch.tensor(0))
    return made


_LAYERS: Mapping[Any, Callable[..., nn.Module]] = {
    _aten.conv2d.default: _conv2d,
    _aten.conv2d.padding: _conv2d,
    _aten.linear.default: _linear,
    _aten.batch_norm.default: _batch_norm,
    _aten.layer_norm.default: _layer_norm,
    _aten.relu.default: nn.ReLU,
    _aten.relu_.default: nn.ReLU,
    _aten.relu6.default: nn.ReLU6,
    _aten.silu.default: nn.SiLU,
    _aten.silu_.default: nn.SiLU,
    _aten.hardswish.default: nn.Hardswish,
    _aten.hardswish_.default: nn.Hardswish,
    _aten.hardsigmoid.default: nn.Hardsigmoid,
    _aten.sigmoid.default: nn.Sigmoid,
    _aten.softmax.int: nn.Softmax,
    _aten.log_softmax.int: nn.LogSoftmax,
    _aten.adaptive_avg_pool2d.default: nn.AdaptiveAvgPool2d,
    _aten.max_pool2d.default: _max_pool,
    _aten.flatten.using_ints: nn.Flatten,
}
"""Makers of modules from the arguments that an operation has after its input."""
