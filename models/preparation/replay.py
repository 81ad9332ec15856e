"""Variants whose backbone another runtime computes, its layers replayed to the hooks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.head import HeadProbe
from models.hooks import ForwardHook, HookStack
from models.layers import TokenLayout, to_map
from models.preparation.precision import alike
from models.preparation.variant import Variant, close, equal_layers, layer_outputs

Run = Callable[[Tensor], Sequence[Tensor]]
"""(N, 3, H, W) → the tensor of each layer, in memory of their own."""


logger = logging.getLogger("heatlens.preparation")


class Refused(Exception):
    """A step of the preparation was refused; the text says why, for the model card."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PooledHead:
    """Global average pooling and a linear layer, proved to be all that follows a layer.

    Attributes:
        layer: name of that layer.
        layout: how its output lies.
        weight: (outputs, channels) float32.
        bias: (outputs,) float32, if there is one.
    """

    layer: str
    layout: TokenLayout | None
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(
        cls, probed: HeadProbe, *, layer: str, layout: TokenLayout | None, outputs: int
    ) -> PooledHead:
        """The head that gives a model's `outputs` scores as they leave the model.

        Raises:
            Refused: it was not proved.
        """
        if probed.weight is None:
            raise Refused("what follows the target layer is not pooling and one linear layer")
        # The probe has two rows, of -z and z, for a single logit z.
        bias = None if probed.bias is None else probed.bias[-outputs:]
        return cls(layer=layer, layout=layout, weight=probed.weight[-outputs:], bias=bias)

    def scores(self, output: Tensor) -> Tensor:
        """The model's output, (N, outputs) float32, from the layer's."""
        pooled = to_map(output, self.layout).float().mean((2, 3))
        return nn.functional.linear(pooled, self.weight, self.bias)


class Replay(nn.Module):
    """A model whose backbone is a function, and whose layers are place-holders of their names.

    Hooks work on the place-holders as on the layers: outputs can be read at all of them. What comes
    before is opaque, so only the head's own layer can be changed or differentiated at, and no
    gradient reaches the images.
    """

    def __init__(self, run: Run, layers: Sequence[str], head: PooledHead) -> None:
        """Args: the backbone, the names of the layers that it returns, and the head."""
        super().__init__()
        self._run = run
        self._head = head
        self._places = {layer: _place(self, layer) for layer in layers}

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, outputs) float32."""
        outputs = zip(self._places.items(), self._run(inputs), strict=True)
        replayed = {layer: place(output) for (layer, place), output in outputs}
        return self._head.scores(replayed[self._head.layer])


def _place(root: nn.Module, layer: str) -> nn.Module:
    """A place-holder under a dotted name; it may hold those of other layers."""
    place = root
    for name in layer.split("."):
        # Not `hasattr`: an attribute of that name is not a place-holder.
        if name not in place._modules:  # noqa: SLF001
            place.add_module(name, nn.Identity())
        place = place.get_submodule(name)
    return place


class LayerOutputs(nn.Module):
    """A model run for the outputs of some of its layers, for other runtimes to compile."""

    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        """Args: the model and dotted names of layers that return one tensor."""
        super().__init__()
        self.module = module
        self._layers = tuple(layers)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) → the output of each layer."""
        outputs: dict[str, Tensor] = {}

        def record(layer: str) -> ForwardHook:
            def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
                # A copy: successors may work in place.
                outputs[layer] = output.clone()

            return hook

        with HookStack() as hooks:
            for layer in self._layers:
                hooks.forward(self.module.get_submodule(layer), record(layer))
            self.module(inputs)
        return tuple(outputs[layer] for layer in self._layers)


class Reference:
    """What plain torch gives for a few images, in float32: replays are judged by it."""

    def __init__(
        self, module: nn.Module, probe: Tensor, *, head: PooledHead, features: Sequence[str]
    ) -> None:
        """Run the original, float32 and on the CPU; `features` are layers of interest, too."""
        self.head = head
        # An odd number, and more than runtimes are shown: no batch size may be special.
        images = torch.cat([probe, probe, probe[:1]])
        self.images = images.contiguous(memory_format=torch.channels_last)
        wanted = dict.fromkeys([*features, head.layer])
        self._expected = layer_outputs(module, self.images, layers=tuple(wanted))
        self.features = tuple(f for f in wanted if f in self._expected and f != head.layer)

    def variant(self, run: Run, layers: Sequence[str], *, exact: bool, step: str) -> Variant:
        """Make a variant of an opaque backbone.

        Args:
            run: the backbone; it takes float32 images.
            layers: names of what it returns; the head's layer is among them.
            exact: whether it computes in float32, and so must give what torch gives; otherwise maps
                and scores must point the same way, as for any half precision.
            step: what was done, for the model card.

        Raises:
            Refused: it fails, or its scores, or its tensors at the head's layer, are not the
                model's.
        """
        equal = close if exact else alike
        module = Replay(run, layers, self.head).eval()
        try:
            found = layer_outputs(module, self.images)
        except Exception as error:
            logger.warning("a backbone fails on a batch of another size", exc_info=True)
            raise Refused("it fails on a batch of another size; the log says more") from error
        if not equal(found[""], self._expected[""]):
            raise Refused("its scores differ from torch's")
        readable = equal_layers(found, self._expected, equal)
        if self.head.layer not in readable:
            raise Refused(f"its tensors at {self.head.layer} differ from torch's")
        return Variant(
            module=module,
            step=step,
            readable=readable,
            rewritable=frozenset({self.head.layer}),
            differentiable=False,
        )
