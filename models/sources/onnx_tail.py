"""The end of an ONNX graph as layers of torch: pooling, linear layers, functions of single values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Layers = list[tuple[str, nn.Module]]


class _SpatialMean(nn.Module):
    """Mean over height and width."""

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, h, w) → (N, C)."""
        return maps.mean((2, 3))


class _UnknownError(Exception):
    """A node that is not translated."""


def translate_tail(onnx: Any, model: Any, start: str) -> Layers | None:
    """Layers for a chain of nodes from a map to the graph's output; None if one is not known.

    The tail begins with global average pooling: before that, gradients would be of use only if more
    of the network had them.
    """
    graph = model.graph
    constants = constants_of(graph)

    def constant(name: str) -> Tensor:
        if name not in constants:
            raise _UnknownError(name)
        return torch.from_numpy(onnx.numpy_helper.to_array(constants[name]).copy())

    layers: Layers = []
    at, output = start, graph.output[0].name
    try:
        while at != output:
            # The shape of a tensor is asked for only to reshape it.
            following = [n for n in graph.node if at in n.input and n.op_type != "Shape"]
            if len(following) != 1 or len(following[0].output) != 1:
                return None
            node = following[0]
            computed = node.op_type in _FLATTENING
            others = [] if computed else [name for name in node.input if name not in (at, "")]
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            _append(layers, node.op_type, [constant(name) for name in others], attributes)
            at = node.output[0]
    except (_UnknownError, KeyError):
        return None
    pools = layers and isinstance(layers[0][1], (_SpatialMean, nn.AdaptiveAvgPool2d))
    return layers if pools else None


def constants_of(graph: Any) -> dict[str, Any]:
    """The tensors that a graph of ONNX holds, by name."""
    constants = {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
    return {tensor.name: tensor for tensor in graph.initializer} | constants


def _append(
    layers: Layers, operation: str, constants: list[Tensor], attributes: Mapping[str, Any]
) -> None:
    """Add the layer of one node, or the bias that it adds to the layer before it."""
    if operation in ("Identity", "Dropout"):
        return
    if operation == "Add" and layers and isinstance(layers[-1][1], nn.Linear):
        linear = layers[-1][1]
        has_bias = any(name == "bias" for name, _ in linear.named_parameters())
        if has_bias or constants[0].shape != (linear.out_features,):
            raise _UnknownError(operation)
        linear.bias = nn.Parameter(constants[0])
        return
    layer = _MAKERS[operation](constants, attributes)
    layers.append((f"{operation.lower()}_{len(layers)}", layer))


def _gemm(constants: list[Tensor], attributes: Mapping[str, Any]) -> nn.Module:
    scaled = attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0
    if scaled or attributes.get("transA"):
        raise _UnknownError("Gemm")
    weight = constants[0] if attributes.get("transB") else constants[0].T
    return _linear(weight, constants[1] if len(constants) > 1 else None)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    if weight.ndim != 2:
        raise _UnknownError("MatMul")
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made


def _mean(constants: list[Tensor], attributes: Mapping[str, Any]) -> nn.Module:
    axes = attributes.get("axes") or (constants[0].tolist() if constants else [])
    if sorted(axis % 4 for axis in axes) != [2, 3]:
        raise _UnknownError("ReduceMean")
    return _SpatialMean() if not attributes.get("keepdims", 1) else nn.AdaptiveAvgPool2d(1)


def _flat(_constants: list[Tensor], _attributes: Mapping[str, Any]) -> nn.Module:
    # After global pooling every reshape is to (N, channels); the whole is compared at loading.
    return nn.Flatten(1)


def _along_classes(kind: type[nn.Softmax | nn.LogSoftmax]) -> Callable[..., nn.Module]:
    def make(_constants: list[Tensor], attributes: Mapping[str, Any]) -> nn.Module:
        if attributes.get("axis", -1) not in (1, -1):
            raise _UnknownError("Softmax")
        return kind(dim=1)

    return make


_FLATTENING = ("Flatten", "Reshape", "Squeeze")
_MAKERS: Mapping[str, Callable[[list[Tensor], Mapping[str, Any]], nn.Module]] = {
    "GlobalAveragePool": lambda *_: nn.AdaptiveAvgPool2d(1),
    "ReduceMean": _mean,
    "Flatten": _flat,
    "Reshape": _flat,
    "Squeeze": _flat,
    "Gemm": _gemm,
    "MatMul": lambda constants, _: _linear(constants[0].T, None),
    "Relu": lambda *_: nn.ReLU(),
    "Sigmoid": lambda *_: nn.Sigmoid(),
    "Softmax": _along_classes(nn.Softmax),
    "LogSoftmax": _along_classes(nn.LogSoftmax),
}
