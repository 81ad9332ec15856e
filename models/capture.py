"""What a pass caught at one layer, in the form that every method takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Capture:
    """The (activation, gradient) pair of one layer for N images with T targets each.

    Attributes:
        layer: dotted module name.
        activation: float32 (N, K, h, w), tokens already laid out as a map.
        gradient: float32 gradient of the scores, (N, T, K, h, w), or (N, T, K, 1, 1) where it is
            the same at every position (heads that begin with global average pooling); None if
            nothing asked for it.
        score: float32 (N, T), the explained scores.
    """

    layer: str
    activation: Tensor
    gradient: Tensor | None
    score: Tensor

    def rows(self, index: Tensor) -> Capture:
        """The same for some of the images; `index` is a long tensor of positions."""
        return Capture(
            layer=self.layer,
            activation=self.activation[index],
            gradient=None if self.gradient is None else self.gradient[index],
            score=self.score[index],
        )

    def first(self, targets: int) -> Capture:
        """The same for the first targets only: a batch repeats those of images that have fewer."""
        return Capture(
            layer=self.layer,
            activation=self.activation,
            gradient=None if self.gradient is None else self.gradient[:, :targets],
            score=self.score[:, :targets],
        )
