"""LRP by one backward pass: its rules as gradients of a pass that computes the same values.

Relevance of a value a is R = a * c. If every operation is rewritten as an equal one, linear in its
inputs with coefficients that are held constant, then c is what autograd propagates, and R is
conserved from each operation to the one before it (Euler's identity for homogeneous functions). So

    sum of R over the pixels + relevance held by biases and stabilisers = score

holds exactly for every model that is rewritten throughout, and is checked for each map.

The pass is rewritten by a `TorchFunctionMode`, which sees every torch function that the model calls
on its way, in a module or not, and works in this thread within a `with` block only: no module,
parameter or hook is touched. A function that it cannot rewrite ends the pass with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.errors import MethodNotApplicable
from models.extractor import Extractor
from models.hooks import ForwardHook
from models.methods._lrp_rules import Affine, box_rule, clipped, epsilon_rule, gamma_rule
from models.readout import Read
from models.targets import ResolvedTarget, ScoreWeights

_SAME_SCORES = 0.02
# A network in half precision rounds in every layer, which the rewritten pass does not.
_ROUNDED_SCORES = {torch.float16: 0.05, torch.bfloat16: 0.25}
_CONSERVED = 1e-3

# Functions that are linear, or positively homogeneous like max pooling: there R = a * c already.
_HOMOGENEOUS = frozenset(
    """
    adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d max_pool2d mean sum amax relu relu_
    cat concat stack split chunk unbind pad view reshape flatten unflatten permute transpose movedim
    squeeze unsqueeze expand expand_as repeat contiguous clone to float __getitem__ channel_shuffle
    dropout dropout_ feature_dropout
    """.split()  # noqa: SIM905 (a list literal would take a line for each)
)
_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__"})
_PRODUCTS = frozenset({"mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "__truediv__"})
_REWRITTEN = _HOMOGENEOUS | _SUMS | _PRODUCTS
_BATCH_NORM = inspect.signature(nn.functional.batch_norm)
_HARDTANH = inspect.signature(nn.functional.hardtanh)


@dataclass(frozen=True, kw_only=True)
class Explained:
    """One image in one model, whose relevance is wanted.

    Attributes:
        read: how its output is read as scores.
        inputs: (1, 3, H, W), normalised.
        low, high: the least and greatest value of each pixel and colour, of the same shape.
        logits: (classes,), the scores that the rewritten pass must arrive at.
        changes: hooks of interventions.
    """

    module: nn.Module
    read: Read
    inputs: Tensor
    low: Tensor
    high: Tensor
    logits: Tensor
    changes: Sequence[tuple[str, ForwardHook]] = ()


def relevance(explained: Explained, targets: Sequence[ResolvedTarget]) -> list[tuple[Tensor, str]]:
    """Relevance of the input's pixels for the score of each target, one pass for all of them.

    Returns:
        A float32 map (H, W) for each target, and how much of the score it holds, in words.

    Raises:
        MethodNotApplicable: relevance is not conserved in the model.
    """
    rules = Rules(explained.inputs, low=explained.low, high=explained.high)
    with Extractor(explained.module, [], changes=explained.changes) as extractor, rules:
        output = extractor.forward(rules.image, graph=True)
    logits, _ = explained.read(rules.settled(output))
    difference = (logits[0].detach() - explained.logits).abs().max()
    precision = next((p.dtype for p in explained.module.parameters()), torch.float32)
    tolerance = _ROUNDED_SCORES.get(precision, _SAME_SCORES)
    if bool(difference > tolerance * explained.logits.abs().max()):
        raise MethodNotApplicable("Relevance cannot follow how this model computes its scores.")
    scores = ScoreWeights([targets], logits.device).of(logits)[0]
    return [rules.explain(score) for score in scores]


class Rules(TorchFunctionMode):
    """Rewrites what runs inside the block; see the module's docstring.

    The epsilon rule in linear layers, the gamma rule in convolutions, the box rule in those that
    see pixels. Weights are taken in float32, so that the pass is one in float32 whatever the
    model's precision.
    """

    def __init__(self, inputs: Tensor, *, low: Tensor, high: Tensor) -> None:
        """Args: the image and the bounds of its values, (1, 3, H, W)."""
        super().__init__()
        self._leaves = [t.detach().float().clone().requires_grad_() for t in (inputs, low, high)]
        self._one = torch.ones((), device=inputs.device).requires_grad_()
        # By id of a tensor, each kept beside what is known of it so that no id is used twice.
        self._bounds: dict[int, list[Tensor]] = {id(self.image): self._leaves}
        self._waiting: dict[int, tuple[Tensor, Affine]] = {}
        self._settled: dict[int, Tensor] = {}

    @property
    def image(self) -> Tensor:
        """The image to run the model on."""
        return self._leaves[0]

    def explain(self, score: Tensor) -> tuple[Tensor, str]:
        """Relevance of the pixels for a score of the pass, (H, W), and a note on its share.

        Raises:
            MethodNotApplicable: relevance was not conserved.
        """
        wanted = [*self._leaves, self._one]
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            score, wanted, retain_graph=True, allow_unused=True
        )
        shares = [
            torch.zeros_like(leaf) if gradient is None else leaf.detach() * gradient
            for leaf, gradient in zip(wanted, gradients, strict=True)
        ]
        pixels = shares[0] + shares[1] + shares[2]
        reached, held, total = float(pixels.sum()), float(shares[3]), float(score.detach())
        if abs(reached + held - total) > _CONSERVED * (float(pixels.abs().sum()) + abs(held)):
            raise MethodNotApplicable("Relevance is not conserved in this model.")
        share = f"Relevance {reached:.3g} of score {total:.3g}"
        return pixels.sum(1)[0], f"{share} reached the pixels, biases hold the rest."

    def settled(self, value: Any) -> Any:
        """The same, with every output that waits for its rule replaced by what the rule gives."""
        if isinstance(value, (list, tuple)):
            return type(value)([self.settled(item) for item in value])
        if not isinstance(value, Tensor) or id(value) not in self._waiting:
            return value
        if id(value) not in self._settled:
            self._settled[id(value)] = self._ruled(self._waiting[id(value)][1])
        return self._settled[id(value)]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        name, named = func.__name__, dict(kwargs or {})
        if name in {"conv2d", "linear"}:
            return self._affine(func, args, named)
        if name == "batch_norm":
            return self._batch_norm(**_bound(_BATCH_NORM, args, named))
        if name == "relu6":
            return clipped(self.settled(args[0]), 6.0)
        if name == "hardtanh":
            given = _bound(_HARDTANH, args, named)
            if given["min_val"] == 0:
                return clipped(self.settled(given["input"]), given["max_val"])
        if name in _REWRITTEN:
            return self._rewritten(func, self.settled(list(args)), named)
        result = func(*args, **named)
        if _carries(result):
            raise MethodNotApplicable(
                f"Relevance has no conserving rule for {name.strip('_')} here."
            )
        return result

    def _affine(
        self, func: Callable[..., Tensor], args: Sequence[Any], named: dict[str, Any]
    ) -> Tensor:
        rest = dict(zip(("input", "weight", "bias"), args, strict=False)) | named
        x = self.settled(rest.pop("input"))
        weight, bias = rest.pop("weight"), rest.pop("bias", None)

        def apply(values: Tensor, kernel: Tensor) -> Tensor:
            return func(values, kernel, None, *args[3:], **rest)

        bias = None if bias is None else bias.to(x.dtype)
        convolution = func.__name__ == "conv2d"
        return self._wait(Affine(x, weight.to(x.dtype), bias, apply, convolution))

    def _batch_norm(
        self,
        *,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        **given: Any,
    ) -> Tensor:
        """Batch normalisation becomes part of the convolution before it, or a scale and a bias."""
        if given["training"]:
            raise MethodNotApplicable(
                "Relevance needs batch normalisation by its running statistics."
            )
        scale = (running_var.float() + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -running_mean * scale if bias is None else bias - running_mean * scale
        _, before = self._waiting.get(id(given["input"]), (None, None))
        if before is not None and before.convolution:
            return self._wait(before.scaled(scale, shift))
        x = self.settled(given["input"])
        shape = (-1, *[1] * (x.ndim - 2))
        output: Tensor = x * scale.view(shape) + shift.view(shape) * self._one
        return output

    def _wait(self, layer: Affine) -> Tensor:
        """Stand in for a layer's output, which a batch normalisation may still become part of."""
        # Not a leaf: what uses it and is then refused may work in place.
        values = layer.output().requires_grad_().clone()
        self._waiting[id(values)] = (values, layer)
        return values

    def _ruled(self, layer: Affine) -> Tensor:
        if not layer.convolution:
            return epsilon_rule(layer, self._one)
        if id(layer.x) in self._bounds:
            _, low, high = self._bounds[id(layer.x)]
            return box_rule(layer, low, high, self._one)
        return gamma_rule(layer, self._one)

    def _rewritten(self, func: Callable[..., Any], args: list[Any], named: dict[str, Any]) -> Any:
        name = func.__name__
        if name.startswith("relu"):
            # Never in place: rules need the values from before.
            return args[0].clamp_min(0)
        carrying = sum(map(_carries, args))
        if name in _PRODUCTS and carrying > 1:
            raise MethodNotApplicable(
                "Relevance has no conserving rule for products of activations."
            )
        if name in _SUMS and carrying:
            args = [arg if _carries(arg) else arg * self._one for arg in args]
        result = func(*args, **named)
        if isinstance(result, Tensor) and self._shows_pixels(args):
            bounds = [func(*self._replaced(args, which), **named) for which in (1, 2)]
            self._bounds[id(result)] = [result, *bounds]
        return result

    def _shows_pixels(self, value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(self._shows_pixels, value))
        return id(value) in self._bounds

    def _replaced(self, value: Any, which: int) -> Any:
        """The same with pixels replaced by their lower (1) or upper (2) bounds."""
        if isinstance(value, (list, tuple)):
            return type(value)([self._replaced(item, which) for item in value])
        return self._bounds[id(value)][which] if id(value) in self._bounds else value


def _bound(
    signature: inspect.Signature, args: Sequence[Any], named: Mapping[str, Any]
) -> dict[str, Any]:
    bound = signature.bind(*args, **named)
    bound.apply_defaults()
    return bound.arguments


def _carries(value: Any) -> bool:
    """Whether relevance may pass through a value."""
    return isinstance(value, Tensor) and value.requires_grad
