"""One hooked pass of a model: what is tapped comes out, the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from models.errors import UnknownLayer
from models.hooks import ForwardHook, ForwardPreHook, HookStack, find_call
from models.types import Kind

_VIEW_CONFLICT = "BackwardHookFunction"


class InplaceConflict(Exception):
    """A full backward hook met a module that works in place; use `tensor_hooks_only`."""


@dataclass(frozen=True)
class Tap:
    """A tensor wanted from the pass.

    Attributes:
        layer: dotted module name, or `name#2` for the second call of a module in the pass; a bare
            name is every call of it.
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
    hooks, gradients of inputs from full backward hooks, or from tensor hooks on the copy that the
    module is given: both say what the module itself passes back, whoever else uses its input.

    A tensor whose first dimension is not the batch ends the pass: what is kept of it would belong
    to another image.

        with Extractor(model, [Tap("layer4", "output"), Tap("layer4", "grad_output")]) as extractor:
            logits = extractor.forward(x)
            extractor.backward(logits[:, 7].sum())
            activation = extractor.caught("layer4", "output")
            gradient = extractor.caught("layer4", "grad_output")

    An extractor is for one pass.
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
        self._calls = {layer: _find(module, layer) for layer in named}
        self._images = self._rows = 0
        self._works_in_place = getattr(module, "works_in_place", True)

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
        self._rows = len(inputs)
        # Of a network that is given a lone image twice, hooks see both.
        self._images = max(self._rows, getattr(self._module, "least_batch", 1))
        output: Tensor = self._module(inputs)
        return output

    def _register(self) -> None:
        for layer, change in self._changes:
            module, call = self._calls[layer]
            self._hooks.forward(module, self._change_hook(change), call=call)
        layers: dict[str, dict[Kind, Tap]] = {}
        for tap in self._taps:
            layers.setdefault(tap.layer, {})[tap.kind] = tap
        for layer, taps in layers.items():
            module, call = self._calls[layer]
            # A full backward hook does not tell the calls of a module apart.
            by_module = "grad_input" in taps and call is None and not self._tensor_hooks_only
            if "input" in taps or "grad_input" in taps:
                by_tensor = "grad_input" in taps and not by_module
                hook = self._input_hook(taps, by_tensor=by_tensor)
                self._hooks.forward_pre(module, hook, call=call)
            if by_module:
                self._hooks.full_backward(module, self._module_hook(taps["grad_input"]))
            if "output" in taps or "grad_output" in taps:
                self._hooks.forward(module, self._output_hook(taps), call=call)

    def _change_hook(self, change: ForwardHook) -> ForwardHook:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._rows == self._images or not isinstance(output, Tensor):
                return change(module, args, output)
            changed = change(module, args, output[: self._rows])
            return torch.cat([changed, output[self._rows :]])

        return hook

    def _input_hook(self, taps: dict[Kind, Tap], *, by_tensor: bool) -> ForwardPreHook:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args or not isinstance(args[0], Tensor):
                return None
            gradient = taps.get("grad_input")
            given = self._tap(args[0], taps.get("input"), gradient)
            if by_tensor and gradient is not None and given is not None and given.requires_grad:
                # Of the copy that this module receives: others may use the same tensor.
                self._hooks.tensor(given, self._tensor_hook(gradient))
            return None if given is None else (given, *args[1:])

        return hook

    def _output_hook(self, taps: dict[Kind, Tap]) -> ForwardHook:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Tensor | None:
            if not isinstance(output, Tensor):
                return None
            gradient = taps.get("grad_output")
            handed_on = self._tap(output, taps.get("output"), gradient)
            if gradient is not None and handed_on is not None and handed_on.requires_grad:
                self._hooks.tensor(handed_on, self._tensor_hook(gradient))
            return handed_on

        return hook

    def _tap(self, tensor: Tensor, value: Tap | None, gradient: Tap | None) -> Tensor | None:
        """Tap a tensor; returns the copy that the model goes on with instead, if it needs one."""
        if tensor.ndim == 0 or len(tensor) != self._images:
            layer = next(tap.layer for tap in (value, gradient) if tap is not None)
            raise UnknownLayer(f"{layer} cannot be used: its first dimension is not the image.")
        if value is not None:
            self._catch(value, tensor)
        # What a model makes under inference mode takes no part in a graph.
        if gradient is None or tensor.is_inference():
            copied = value is not None and value.shares_memory and self._works_in_place
            return tensor.clone() if copied else None
        # The tensor as a node of the graph: itself where the graph has begun, else the graph's
        # start.
        root = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        self._roots.append(root)
        return root.clone()

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
        own = tensor if self._rows == self._images else tensor[: self._rows]
        self._caught[tap.layer, tap.kind] = tap.keep(own.detach())


def _find(module: nn.Module, layer: str) -> tuple[nn.Module, int | None]:
    try:
        return find_call(module, layer)
    except AttributeError:
        raise UnknownLayer(f"The model has no layer {layer!r}.") from None
