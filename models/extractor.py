"""One hooked pass of a model: what is tapped comes out, the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from models.errors import UnknownLayer
from models.hooks import ForwardHook, HookStack
from models.types import Kind

_VIEW_CONFLICT = "BackwardHookFunction"


class InplaceConflict(Exception):
    """A full backward hook met a module that works in place; use `tensor_hooks_only`."""


@dataclass(frozen=True)
class Tap:
    """A tensor wanted from the pass.

    Attributes:
        layer: dotted module name.
        kind: which of the module's tensors: its output, its (first) input, or the gradient of
            either.
        keep: what is kept of the tensor, called inside the hook with the detached tensor; keeping
            only statistics there frees the tensor at once.
        shares_memory: whether what is kept may be the tensor itself or a view of it. The model then
            goes on with a copy, since what follows may work in place.
    """

    layer: str
    kind: Kind
    keep: Callable[[Tensor], Any] = torch.Tensor.detach
    shares_memory: bool = True


class Extractor:
    """Runs a model once and gives out the tapped tensors.

    Parameters of the model must be frozen. Then nothing before the first layer whose gradient is
    tapped is recorded: its hook detaches the tensor, makes it the start of the graph and hands a
    clone downstream (a successor may work in place), so that `backward` touches only what comes
    after it. `.grad` is never written.

    Inputs come from forward pre-hooks, outputs from forward hooks, gradients of outputs from tensor
    hooks, gradients of inputs from full backward hooks.

        with Extractor(model, [Tap("layer4", "output"), Tap("layer4", "grad_output")]) as extractor:
            logits = extractor.forward(x)
            extractor.backward(logits[:, 7].sum())
            activation = extractor.caught("layer4", "output")
            gradient = extractor.caught("layer4", "grad_output")

    A module that is called several times in a pass gives what its last call gave, so `models.proof`
    refuses such a layer.
    """

    def __init__(
        self,
        module: nn.Module,
        taps: Sequence[Tap],
        *,
        changes: Sequence[tuple[str, ForwardHook]] = (),
        tensor_hooks_only: bool = False,
    ) -> None:
        """Prepare a pass; hooks are registered on entering the context.

        Args:
            module: the model, in eval mode, its parameters frozen.
            taps: what is wanted.
            changes: hooks that replace a layer's output before anything is tapped there.
            tensor_hooks_only: take gradients of inputs by tensor hooks too, for models that work in
                place.

        Raises:
            UnknownLayer: a tap or change names no module.
        """
        self._module = module
        self._taps = tuple(taps)
        self._changes = tuple(changes)
        self._tensor_hooks_only = tensor_hooks_only
        self._hooks = HookStack()
        self._roots: list[Tensor] = []
        self._caught: dict[tuple[str, Kind], Any] = {}
        # Looked up one by one: listing a model's hundreds of modules costs more than a small pass
        # may.
        named = [*(tap.layer for tap in taps), *(layer for layer, _ in changes)]
        self._modules = {layer: _submodule(module, layer) for layer in named}

    @property
    def records_graph(self) -> bool:
        """Whether any tap wants a gradient."""
        return any(tap.kind.startswith("grad_") for tap in self._taps)

    def __enter__(self) -> Self:
        try:
            self._register()
        except BaseException:
            self._hooks.remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.remove()
        self._roots.clear()
        self._caught.clear()

    def forward(self, inputs: Tensor, *, graph: bool = False) -> Tensor:
        """Run the model.

        Args:
            inputs: (N, C, H, W) on the model's device.
            graph: record a graph from `inputs` on, for gradients of the inputs themselves.

        Returns:
            Its output, with a graph only if one is asked for or a gradient is tapped.

        Raises:
            InplaceConflict: gradients of inputs are tapped and the model works in place around
                them.
        """
        if not (graph or self.records_graph):
            with torch.inference_mode():
                return self._call(inputs)
        with torch.enable_grad():
            try:
                return self._call(inputs)
            except RuntimeError as error:
                if _VIEW_CONFLICT in str(error):
                    raise InplaceConflict from error
                raise

    def backward(self, score: Tensor, *, again: bool = False) -> None:
        """Differentiate a scalar; what earlier calls caught of gradients is replaced.

        Args:
            score: scalar made from the output of `forward`.
            again: whether another call follows, so that the graph is kept.
        """
        for key in [key for key in self._caught if key[1].startswith("grad_")]:
            del self._caught[key]
        if score.requires_grad:
            torch.autograd.grad(score, self._roots, retain_graph=again, allow_unused=True)

    def caught(self, layer: str, kind: Kind) -> Any:
        """What the tap kept of the last pass (for gradients: of the last `backward`).

        Returns:
            What `keep` returned, or None where the tensor took no part in the pass or in the score.
        """
        return self._caught.get((layer, kind))

    def _call(self, inputs: Tensor) -> Tensor:
        output: Tensor = self._module(inputs)
        return output

    def _register(self) -> None:
        for layer, change in self._changes:
            self._hooks.forward(self._modules[layer], change)
        layers: dict[str, dict[Kind, Tap]] = {}
        for tap in self._taps:
            layers.setdefault(tap.layer, {})[tap.kind] = tap
        for layer, taps in layers.items():
            module = self._modules[layer]
            if "input" in taps or "grad_input" in taps:
                self._hooks.forward_pre(module, self._input_hook(taps))
            if "grad_input" in taps and not self._tensor_hooks_only:
                self._hooks.full_backward(module, self._module_hook(taps["grad_input"]))
            if "output" in taps or "grad_output" in taps:
                self._hooks.forward(module, self._output_hook(taps))

    def _input_hook(
        self, taps: dict[Kind, Tap]
    ) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            tensor, rest = _first(args)
            if tensor is None:
                return None
            handed_on = self._tap(tensor, taps.get("input"), taps.get("grad_input"))
            return None if handed_on is None else (handed_on, *rest)

        return hook

    def _output_hook(
        self, taps: dict[Kind, Tap]
    ) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            tensor, rest = _first(output)
            if tensor is None:
                return None
            handed_on = self._tap(tensor, taps.get("output"), taps.get("grad_output"))
            if handed_on is None or isinstance(output, Tensor):
                return handed_on
            return type(output)((handed_on, *rest))

        return hook

    def _tap(self, tensor: Tensor, value: Tap | None, gradient: Tap | None) -> Tensor | None:
        """Tap a tensor and its gradient; returns what the model goes on with instead, if any."""
        if gradient is None:
            if value is None:
                return None
            self._catch(value, tensor)
            return tensor.clone() if value.shares_memory else None
        # The tensor as a node of the graph: itself where the graph has begun, else the graph's
        # start.
        root = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        self._roots.append(root)
        if value is not None:
            self._catch(value, root)
        received = root.clone()
        if gradient.kind == "grad_output":
            self._hooks.tensor(root, self._tensor_hook(gradient))
        elif self._tensor_hooks_only:
            # Of the clone that this module receives: others may use the same tensor.
            self._hooks.tensor(received, self._tensor_hook(gradient))
        return received

    def _tensor_hook(self, tap: Tap) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self._catch(tap, gradient)

        return hook

    def _module_hook(self, tap: Tap) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, grad_input: tuple[Tensor | None, ...], __: Any) -> None:
            if grad_input and grad_input[0] is not None:
                self._catch(tap, grad_input[0])

        return hook

    def _catch(self, tap: Tap, tensor: Tensor) -> None:
        self._caught[tap.layer, tap.kind] = tap.keep(tensor.detach())


def _submodule(module: nn.Module, layer: str) -> nn.Module:
    try:
        return module.get_submodule(layer)
    except AttributeError:
        raise UnknownLayer(f"The model has no layer {layer!r}.") from None


def _first(value: Any) -> tuple[Tensor | None, tuple[Any, ...]]:
    """The first tensor of a module's inputs or outputs, and what follows it."""
    if isinstance(value, Tensor):
        return value, ()
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return value[0], tuple(value[1:])
    return None, ()
