"""What a row of the METHODS table says. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from models.types import Struct

Family = Literal["gradient", "activation", "perturbation", "pixels", "transformer"]
Cost = Literal["pass", "head", "passes", "many"]


class Method(Struct):
    """One explanation method.

    Attributes:
        name: name in the API; also the name of the function in `models.methods.<family>`.
        paper: where it was defined.
        formula: what is computed, with A_k = channel k of the activation, g = its gradient, Z = its
            pixels.
        needs_gradients: whether the pass must be differentiated.
        signed: whether negative values of the map mean evidence against the class.
        cost: `pass` (free with the prediction) or `head` (a pass of the head per target): the
            function takes a `Capture` of N images and returns maps (N, T, h, w). `passes` (a few
            passes of the network) or `many` (hundreds): the function is a generator of steps for
            one `Subject` and returns maps (T, h, w).
        defaults: default `samples`, `steps`, `seed` and the like.
        assumes_nonnegative: whether the derivation needs a layer without negative values; on others
            the answer carries a warning.
        of_input: whether it explains the input itself, whatever layers are named.
    """

    name: str
    title: str
    paper: str
    formula: str
    family: Family
    needs_gradients: bool
    signed: bool
    cost: Cost
    defaults: dict[str, Any] = {}
    assumes_nonnegative: bool = False
    of_input: bool = False
