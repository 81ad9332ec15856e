"""Which methods can explain a model, and why the others cannot. No torch here."""

from __future__ import annotations

from collections.abc import Callable

from models.methods import METHODS
from models.methods.table import Family, Method
from models.types import HeadKind, MethodSupport, Struct


class ModelFacts(Struct):
    """What the probes found out about a model.

    Attributes:
        target_layer: its `auto` layer; None if no map of it has a gradient.
        head: what follows that layer.
        closed_form: whether the gradient there was proved to be W[c]/Z.
        refusals: by name of a method that was tried on it and refused, the reason.
    """

    target_layer: str | None
    head: HeadKind | None
    closed_form: bool
    refusals: dict[str, str] = {}


Rule = Callable[[ModelFacts], str | None]
"""Why a method cannot explain the model; None if it can."""


def method_support(method: Method, facts: ModelFacts) -> MethodSupport:
    """Tell whether a method can explain a model: by the rule of its family, its own if it has one, and its trial."""
    rules = [_FAMILY_RULES.get(method.family), _METHOD_RULES.get(method.name), _trial(method.name)]
    reason = next((why for rule in rules if rule and (why := rule(facts))), None)
    return MethodSupport(name=method.name, applicable=reason is None, reason=reason)


def supported_methods(facts: ModelFacts) -> tuple[MethodSupport, ...]:
    """Return one row for every method, in the order of METHODS."""
    return tuple(method_support(method, facts) for method in METHODS.values())


def _needs_map(facts: ModelFacts) -> str | None:
    if facts.target_layer is None:
        return "no layer of the model is a map of the picture that the scores depend on"
    return None


def _needs_closed_form(facts: ModelFacts) -> str | None:
    if not facts.closed_form:
        return (
            "it needs global average pooling and then a single linear layer after the target layer"
        )
    return None


def _trial(name: str) -> Rule:
    return lambda facts: facts.refusals.get(name)


_FAMILY_RULES: dict[Family, Rule] = {"gradient": _needs_map, "activation": _needs_map}
_METHOD_RULES: dict[str, Rule] = {
    "cam": _needs_closed_form,
    "scorecam": _needs_map,
    "ss_cam": _needs_map,
    "is_cam": _needs_map,
    "ablationcam": _needs_map,
    "guided_gradcam": _needs_map,
}
