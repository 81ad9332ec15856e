"""Rules of layer-wise relevance propagation, as layers of the same values with other gradients.

Each rule takes a layer and returns its output z, written as a sum of shares of its inputs whose
coefficients are held constant. With relevance R = z * c and c what autograd propagates, the inputs
of a share get relevance in proportion to it. Biases are written as b * one, with a variable `one` =
1 whose gradient is the relevance that they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GAMMA = 0.25
"""Of the gamma rule; in units of a contribution."""

EPSILON = 0.25
"""Of the epsilon rule; in units of the root mean square of a layer's output."""


@dataclass(frozen=True)
class Affine:
    """A convolution or linear layer that was called.

    Attributes:
        x: its input, (1, …).
        weight: its weight.
        bias: (channels,), if it has one.
        apply: the layer without bias, `apply(x, weight)`.
        convolution: whether its channels come before height and width, not last.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    apply: Callable[[Tensor, Tensor], Tensor]
    convolution: bool

    def scaled(self, scale: Tensor, shift: Tensor) -> Affine:
        """The convolution followed by `scale * z + shift` of each channel, as one convolution."""
        weight = self.weight * scale.view(-1, 1, 1, 1)
        bias = shift if self.bias is None else self.bias * scale + shift
        return replace(self, weight=weight, bias=bias)

    def output(self) -> Tensor:
        """What the layer computes, without a graph."""
        with torch.no_grad():
            return self.apply(self.x, self.weight) + self.shift()

    def shift(self) -> Tensor:
        """The bias, 0 if there is none, in a shape that can be added to the output."""
        if self.bias is None:
            return self.x.new_zeros(())
        return self.bias.view(-1, 1, 1) if self.convolution else self.bias


def epsilon_rule(layer: Affine, one: Tensor) -> Tensor:
    """R_i = sum_j x_i w_ij / (z_j + epsilon sign z_j) R_j (Bach et al. 2015, eq. 58)."""
    share = layer.apply(layer.x, layer.weight) + layer.shift() * one
    values = share.detach()
    stabiliser = EPSILON * values.square().mean(-1, keepdim=True).sqrt()
    return _shared(share, values, quotient(values.abs(), values.abs() + stabiliser), one)


def gamma_rule(layer: Affine, one: Tensor) -> Tensor:
    """R_i = sum_j s_ij / sum_i s_ij R_j, s_ij = x_i w_ij + gamma (x_i w_ij)^±, ^+ where z_j > 0.

    Montavon et al. 2019, section 10.2, for inputs and outputs of both signs: the sum of the shares
    has the sign of z_j and is no smaller, so that nothing is divided by something near 0.
    """
    plus, minus = _signed(layer, one)
    values = (plus + minus).detach()
    share = torch.where(values > 0, plus * (1 + GAMMA) + minus, plus + minus * (1 + GAMMA))
    return _shared(share, values, quotient(values, share.detach()), one)


def box_rule(layer: Affine, low: Tensor, high: Tensor, one: Tensor) -> Tensor:
    """R_i = sum_j s_ij / sum_i s_ij R_j, s_ij = x_i w_ij - l_i w_ij^+ - h_i w_ij^-.

    Montavon et al. 2017, eq. 17, for inputs between l and h: no share is negative, and the bias has
    none.
    """
    share = layer.apply(layer.x, layer.weight)
    values = share.detach() + layer.shift()
    share = share - layer.apply(low, layer.weight.clamp_min(0))
    share = share - layer.apply(high, layer.weight.clamp_max(0))
    return _shared(share, values, quotient(values, share.detach()), one)


def clipped(x: Tensor, limit: float) -> Tensor:
    """A ReLU that is clipped at `limit`; all relevance goes through, also where it is clipped."""
    return x * quotient(x.detach().clamp(0.0, limit), x.detach())


def quotient(values: Tensor, by: Tensor) -> Tensor:
    """Return values / by, 0 where that is not defined."""
    return torch.where(by == 0, 0.0, values / torch.where(by == 0, 1.0, by))


def _signed(layer: Affine, one: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the positive and the negative contributions to a layer's output, bias included."""
    positive, negative = layer.weight.clamp_min(0), layer.weight.clamp_max(0)
    x = layer.x.clamp_min(0)
    plus, minus = layer.apply(x, positive), layer.apply(x, negative)
    if bool((layer.x < 0).any()):
        x = layer.x.clamp_max(0)
        plus, minus = plus + layer.apply(x, negative), minus + layer.apply(x, positive)
    shift = layer.shift()
    return plus + shift.clamp_min(0) * one, minus + shift.clamp_max(0) * one


def _shared(share: Tensor, values: Tensor, factor: Tensor, one: Tensor) -> Tensor:
    """Return `values`, whose relevance goes where `factor * share` takes it.

    What that misses of the values (stabilisers, outputs to which no input contributed) is held like
    a bias.
    """
    passed = share * factor
    return passed + (values - passed.detach()) * one
