"""Variants whose backbone another runtime computes, its layers replayed to the hooks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from models.head import HeadProbe
from models.hooks import ForwardHook, HookStack
from models.layers import TokenLayout, to_map
from models.preparation.precision import alike
from models.preparation.variant import Variant, close, equal_layers, layer_outputs
from models.proof_cache import ProofCache

Run = Callable[[Tensor], Sequence[Tensor]]
"""(N, 3, H, W) → tensors of layers, in memory of their own."""

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

    Attributes:
        input_dtype: what it takes, whatever the backbone computes in.
        works_in_place: whether anything overwrites what a layer has returned.
        pools: whether its scores are by construction what its head makes of a layer.
    """

    input_dtype = torch.float32
    works_in_place = False
    pools = True

    def __init__(self, run: Run, layers: Mapping[str, int], head: PooledHead) -> None:
        """Args: the backbone, which of its tensors each layer returns, and the head."""
        super().__init__()
        self._run = run
        self._head = head
        self._places = [(layer, _place(self, layer), index) for layer, index in layers.items()]

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, outputs) float32."""
        tensors = self._run(inputs)
        replayed = {layer: place(tensors[index]) for layer, place, index in self._places}
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
    """What plain torch gives for a few images, in float32: replays are judged by it.

    Attributes:
        head: what makes the scores.
        images: (N, 3, H, W), those that were probed and more.
        outputs: names of layers with different tensors, the head's layer first.
    """

    def __init__(
        self,
        module: nn.Module,
        probed: tuple[Tensor, Tensor],
        *,
        head: PooledHead,
        features: Sequence[str],
        cache: ProofCache | None = None,
    ) -> None:
        """Args: the original, float32 and on the CPU, images with its scores, and default layers.

        It is run, for its head's layer, `features` and blocks, if `cache` does not know it.
        """
        self.head = head
        self._module = module
        self._probe, self._scores = probed
        # An odd number, and more than runtimes are shown: no batch size may be special.
        images = torch.cat([self._probe, self._probe, self._probe[:1]])
        self.images = images.contiguous(memory_format=torch.channels_last)
        self._wanted = list(dict.fromkeys([head.layer, *features, *_blocks(module)]))
        self._cache = cache or ProofCache(None)
        what = f"replayed layers, {' '.join(self._wanted)}"
        self._places = self._cache.remember(what, dict[str, int], self._find_places)
        first = {place: layer for layer, place in reversed(self._places.items())}
        self.outputs = [first[place] for place in sorted(first)]

    def is_proved(self, place: str) -> bool:
        """Whether an earlier start has proved the variants that are made in a place."""
        return self._cache.recall(self._proof(1, place), list[str]) is not None

    def variant(self, run: Run, count: int, *, exact: bool, step: str, place: str = "") -> Variant:
        """Make a variant of an opaque backbone.

        Which of its tensors are the model's is proved once; its scores are at each start, unless
        it gives what another variant gives, and more.

        Args:
            run: the backbone; it takes float32 images.
            count: how many of `outputs` it returns.
            exact: whether it computes in float32, and so must give what torch gives; otherwise maps
                and scores must point the same way, as for any half precision.
            step: what was done, for the model card.
            place: what computes, and in which precision and where.

        Raises:
            Refused: it fails, or its scores, or its tensors at the head's layer, are not the
                model's.
        """
        equal = close if exact else alike
        layers = {layer: place for layer, place in self._places.items() if place < count}
        module = Replay(run, layers, self.head).eval()
        what = self._proof(count, place)
        readable = self._cache.recall(what, list[str])
        if readable is None:
            readable = self._prove(module, equal)
            self._cache.keep(what, readable)
        elif count == 1:
            with torch.inference_mode():
                if not equal(module(self._probe), self._scores):
                    raise Refused("its scores differ from torch's")
        return Variant(
            module=module,
            step=step,
            readable=frozenset(readable),
            rewritable=frozenset({self.head.layer}),
            differentiable=False,
        )

    def _proof(self, count: int, place: str) -> str:
        """Under which name it is kept which layers can be read."""
        return f"replay of {count}, {place}, {' '.join(self._wanted)}"

    def _prove(self, module: nn.Module, equal: Callable[[Tensor, Tensor], bool]) -> list[str]:
        """The layers of a replay that have the model's tensors."""
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
        return sorted(readable)

    @cached_property
    def _expected(self) -> dict[str, Tensor]:
        return layer_outputs(self._module, self.images, layers=self._wanted)

    def _find_places(self) -> dict[str, int]:
        """Which of `outputs` each layer's tensor is: that of another layer, or a new one."""
        places: dict[str, int] = {}
        outputs: list[Tensor] = []
        for layer in self._wanted:
            output = self._expected.get(layer)
            if output is not None and len(output) == len(self.images):
                same = (n for n, other in enumerate(outputs) if torch.equal(output, other))
                places[layer] = next(same, len(outputs))
                if places[layer] == len(outputs):
                    outputs.append(output)
        return places


def _blocks(module: nn.Module) -> list[str]:
    """Names of the modules that hold several convolutions: what is looked at most within a model."""
    counts = {
        name: sum(isinstance(part, nn.Conv2d) for part in child.modules())
        for name, child in module.named_modules()
    }
    return [name for name, count in counts.items() if name and count > 1]
