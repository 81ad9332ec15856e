"""Every hook of the project is registered here, and removed here.

Four kinds take tensors out of a model without touching it: forward pre-hooks (a module's inputs),
forward hooks (its output), full backward hooks (gradients at the module) and tensor hooks (the
gradient of one tensor). A fifth, node hooks, changes the gradients that reach one operation of a
recorded graph.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

ForwardPreHook = Callable[[nn.Module, tuple[Any, ...]], Any]
ForwardHook = Callable[[nn.Module, tuple[Any, ...], Any], Any]
BackwardHook = Callable[[nn.Module, Any, Any], Any]
TensorHook = Callable[[Tensor], Tensor | None]
NodeHook = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...] | None]


class HookStack:
    """Registers hooks and removes all of them on exit, whatever ended the block.

    Removal is idempotent, goes in reverse order of registration, and is the only way a hook leaves:
    no hook of ours outlives the pass it was made for. A hook that returns a value replaces what it
    was given, as in torch.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __len__(self) -> int:
        """Number of hooks that are registered now."""
        return len(self._handles)

    def forward_pre(
        self, module: nn.Module, hook: ForwardPreHook, *, call: int | None = None
    ) -> None:
        """Call `hook(module, args)` before `module` runs; before one call of a pass, from 1, only."""
        self._handles.append(module.register_forward_pre_hook(_at(call, hook)))

    def forward(self, module: nn.Module, hook: ForwardHook, *, call: int | None = None) -> None:
        """Call `hook(module, args, output)` after `module` ran; after one call of a pass only."""
        self._handles.append(module.register_forward_hook(_at(call, hook)))

    def full_backward(self, module: nn.Module, hook: BackwardHook) -> None:
        """Call `hook(module, grad_input, grad_output)` when gradients at `module` are known.

        Torch wraps the module's inputs and outputs in a view for this: a successor that works in
        place then raises (pytorch issue 61519). Prefer `tensor` hooks where a tensor is at hand.
        """
        self._handles.append(module.register_full_backward_hook(hook))

    def tensor(self, tensor: Tensor, hook: TensorHook) -> None:
        """Call `hook(gradient)` when the gradient of `tensor` is known."""
        self._handles.append(tensor.register_hook(hook))

    def node(self, node: Node, hook: NodeHook) -> None:
        """Call `hook(gradients)` before a node passes gradients on; it may return others."""
        self._handles.append(node.register_prehook(hook))

    def remove(self) -> None:
        """Remove every hook; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()


def find_call(root: nn.Module, layer: str) -> tuple[nn.Module, int | None]:
    """The module that a layer's name means, and which of its calls: `name#2` is the second.

    Raises:
        AttributeError: there is no such module.
    """
    path, _, call = layer.partition("#")
    return root.get_submodule(path), int(call) if call else None


def _at(call: int | None, hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook at one call of its module, from 1; at every call if that is None."""
    if call is None:
        return hook
    calls = count(1)

    def only(*args: Any) -> Any:
        return hook(*args) if next(calls) == call else None

    return only
