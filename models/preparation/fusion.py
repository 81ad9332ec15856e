"""Finds convolutions in any model that can be fused with what follows them.

Each module is traced on its own with its children left whole, so containers keep their names and
their hooks; a module in which something was fused becomes a graph module of the same name. Modules
that cannot be traced stay.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from models.preparation.convolution import RELU, Activation, FusedConv2d, activation_of

_IDLE = ("Identity", "Dropout", "Dropout2d", "DropPath", "StochasticDepth")
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RELUS = (torch.relu, torch.relu_, nn.functional.relu)


class _Shallow(fx.Tracer):
    """Traces one module's forward; its children stay calls."""

    def is_leaf_module(self, *_: Any) -> bool:
        return True


def fuse_convolutions(module: nn.Module) -> tuple[nn.Module, int]:
    """Fuse convolutions with the batch-norms, activations and residual sums that follow them.

    Args:
        module: in eval mode; changed. A fused convolution replaces the last of the modules that
            it computes; the outputs of the others can no longer be read.

    Returns:
        The module (a new object if its own forward was rewritten), and the number of convolutions
        that now do more than convolve.
    """
    fused = 0
    for name, child in sorted(module.named_modules(), key=lambda item: -item[0].count(".")):
        if name and any(isinstance(m, nn.Conv2d) for m in child.children()):
            rewritten, count = _rewrite(child)
            if count:
                parent, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(parent), leaf, rewritten)
                fused += count
    rewritten, count = _rewrite(module)
    return rewritten, fused + count


def _rewrite(module: nn.Module) -> tuple[nn.Module, int]:
    """The module with its chains fused, and how many there were."""
    try:
        graph = _Shallow().trace(module)
    # Whatever a model's forward does under tracing, the module then stays as it is.
    except Exception:  # noqa: BLE001
        return module, 0
    children = dict(module.named_modules())
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    count = 0
    for node in list(graph.nodes):
        name = str(node.target)
        if _calls(node, children, nn.Conv2d) and calls[name] == 1 and _is_plain(children[name]):
            count += _fuse_at(node, module, children, calls)
    if not count:
        return module, 0
    graph.lint()
    rewritten = fx.GraphModule(module, graph, type(module).__name__)
    return rewritten.eval(), count


def _fuse_at(
    node: fx.Node, module: nn.Module, children: dict[str, nn.Module], calls: Counter[str]
) -> int:
    """Fuse what follows one convolution; 1 if anything did."""
    conv = children[str(node.target)]
    assert isinstance(conv, nn.Conv2d)
    chain = [node]
    norm: nn.BatchNorm2d | None = None
    activation: Activation | None = None
    follower = _follower(chain, children)
    if follower is not None and _calls(follower, children, nn.BatchNorm2d):
        found = children[str(follower.target)]
        assert isinstance(found, nn.BatchNorm2d)
        # timm's batch-norms may hold their activation.
        norm, inner = found, getattr(found, "act", None)
        if inner is not None and not isinstance(inner, nn.Identity):
            activation = activation_of(inner)
            if activation is None:
                return 0
        chain.append(follower)
        follower = _follower(chain, children)
    residual = None
    if activation is None and follower is not None and _is_sum(follower):
        residual = next(arg for arg in follower.args if arg is not chain[-1])
        chain.append(follower)
        follower = _follower(chain, children)
    if activation is None and follower is not None:
        activation = _activation_at(follower, children)
        if activation is not None:
            chain.append(follower)
    if len(chain) == 1:
        return 0
    # In the place of the chain's last module, whose output it then gives: hooks there stay right.
    name = next(
        str(n.target)
        for n in reversed(chain)
        if n.op == "call_module" and calls[str(n.target)] == 1
    )
    fused = FusedConv2d(conv, norm, activation)
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, fused)
    children[name] = fused
    graph = node.graph
    with graph.inserting_after(chain[-1]):
        args = (node.args[0],) if residual is None else (node.args[0], residual)
        call = graph.call_module(name, args)
    chain[-1].replace_all_uses_with(call)
    for old in reversed(chain):
        graph.erase_node(old)
    return 1


def _follower(chain: list[fx.Node], children: dict[str, nn.Module]) -> fx.Node | None:
    """The one node that uses the chain's end; idle modules on the way join the chain."""
    while True:
        users = list(chain[-1].users)
        if len(users) != 1:
            return None
        follower = users[0]
        module = children.get(str(follower.target)) if follower.op == "call_module" else None
        if module is None or type(module).__name__ not in _IDLE or len(follower.args) != 1:
            return follower
        chain.append(follower)


def _calls(node: fx.Node, children: dict[str, nn.Module], kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(children.get(str(node.target)), kind)


def _is_plain(conv: nn.Module) -> bool:
    assert isinstance(conv, nn.Conv2d)
    name = type(conv).__name__
    return (
        name in ("Conv2d", "Conv2dSame")
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def _is_sum(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and node.target in _ADDITIONS
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(arg, fx.Node) for arg in node.args)
        and node.args[0] is not node.args[1]
    )


def _activation_at(node: fx.Node, children: dict[str, nn.Module]) -> Activation | None:
    if node.op == "call_module":
        return activation_of(children[str(node.target)])
    if (node.op == "call_function" and node.target in _RELUS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    ):
        return RELU
    return None
