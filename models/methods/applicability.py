"""Which methods can explain a model, found by rules and trials when it is loaded."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from models.errors import MethodNotApplicable
from models.methods._attention import verify_transformer
from models.methods._fullgrad import misplaced, obstacle
from models.methods._guided import relus
from models.methods._lrp import Explained, relevance
from models.methods.table import METHODS, Method
from models.probe import Trace
from models.proof import Proofs, layouts_of
from models.readout import plain
from models.targets import ResolvedTarget, class_scores
from models.types import HeadKind, MethodSupport, Struct, Task

logger = logging.getLogger("heatlens.models")

_SMALL_SIDE = 96
"""Side of the image on which LRP is tried: an input's size does not change what a model does."""


_UNSUITABLE: Mapping[Task, dict[str, str]] = {
    "segmentation": {
        "finercam": "it compares classes, whose scores are of pixels of their own here",
        "shapleycam": "it differentiates the probability of a class, which is a share of pixels here",
    },
    "embedding": {
        "finercam": "it compares classes, and a similarity has none",
        "shapleycam": "it differentiates the probability of a class, and a similarity has none",
        "fullgrad": "its parts add up to a score that is linear in the output, and a cosine is not",
        "lrp": "it passes back a score that is linear in the output, and a cosine is not",
    },
}
"""Methods that have no meaning for a task, and why."""


class ModelFacts(Struct):
    """What the probes found out about a model.

    Attributes:
        target_layer: its `auto` layer; None if the scores depend on no map of it.
        head: what follows that layer.
        closed_form: whether the gradient there was proved to be W[c]/Z.
        differentiable: whether gradients of the scores reach the image.
        layer_differentiable: whether they reach the target layer.
        refusals: by name of a method that was tried on it and refused, the reason.
    """

    target_layer: str | None
    head: HeadKind | None
    closed_form: bool
    differentiable: bool = True
    layer_differentiable: bool = True
    refusals: dict[str, str] = {}


def method_support(method: Method, facts: ModelFacts) -> MethodSupport:
    """Tell whether a method can explain a model."""
    reason = _obstacle(method, facts)
    return MethodSupport(name=method.name, applicable=reason is None, reason=reason)


def supported_methods(facts: ModelFacts) -> tuple[MethodSupport, ...]:
    """Return one row for every method, in the order of METHODS."""
    return tuple(method_support(method, facts) for method in METHODS.values())


def try_methods(traced: Trace, proofs: Proofs, *, task: Task) -> dict[str, str]:
    """Try the methods whose rules are proved model by model, on one image of a trace.

    Guided backpropagation looks for ReLUs in the recorded graph, LRP for conservation of relevance
    (on a small image where the model takes one), attention methods for attention that they
    reproduce, FullGrad for biases that it cannot account for or that have no place in the image.

    The traced module is frozen and float32; trials run on copies of it. A trial that fails refuses
    its methods. Returns the reason, as a clause, by name of each method that cannot explain the
    model.
    """
    image, layouts = traced.probe[:1], layouts_of(proofs)
    fresh = partial(copy.deepcopy, traced.module)
    guided = conserving = None
    # Others are refused for that, whatever they are made of.
    if traced.differentiable:
        guided = _refusal(lambda: relus(traced.scores))
        explained = partial(_explained, task=task, image=image)
        conserving = _refusal(lambda: relevance(explained(fresh()), [ResolvedTarget(0)]))
    attentive = _refusal(lambda: verify_transformer(fresh(), layouts, image))
    reasons = {"guided_backprop": guided, "guided_gradcam": guided, "lrp": conserving}
    reasons["fullgrad"] = obstacle(traced.module) or misplaced(traced, proofs)
    reasons |= _UNSUITABLE.get(task, {})
    reasons |= {name: attentive for name, row in METHODS.items() if row.family == "transformer"}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _obstacle(method: Method, facts: ModelFacts) -> str | None:
    """Why a method cannot explain the model, by what it needs and by its trial."""
    needs_map = method.family == "gradient" or not method.of_input
    mapless = needs_map and facts.target_layer is None
    reached = facts.differentiable or not method.of_input
    reached = reached and (facts.layer_differentiable or not needs_map)
    if not reached and method.needs_gradients and not (mapless and facts.differentiable):
        place = "map" if facts.differentiable else "image"
        return (
            f"no gradient of the scores reaches the {place}: the network computes under "
            "torch.no_grad() or inference_mode(), detaches what it computes, or is quantised"
        )
    if mapless:
        return "no layer of the model is a map of the image that the scores depend on"
    if method.name == "cam" and not facts.closed_form:
        return (
            "it needs global average pooling and then a single linear layer after the target layer"
        )
    return facts.refusals.get(method.name)


def _explained(module: nn.Module, task: Task, image: Tensor) -> Explained:
    """The image made small, or itself where the model does not take a small one."""
    small = nn.functional.interpolate(image, (_SMALL_SIDE, _SMALL_SIDE), mode="nearest")
    with torch.no_grad():
        try:
            logits, _ = class_scores(module(small), task)
        # Models that insist on their input's size say so in many ways.
        except Exception:  # noqa: BLE001
            small = image
            logits, _ = class_scores(module(image), task)
    return Explained(
        module=module,
        read=plain(task),
        inputs=small,
        low=small.amin().expand_as(small),
        high=small.amax().expand_as(small),
        logits=logits[0],
    )


def _refusal(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except MethodNotApplicable as error:
        return error.message[0].lower() + error.message[1:].rstrip(".")
    except Exception as error:
        logger.warning("the trial of a method fails on the network", exc_info=True)
        return f"its trial on the network fails ({type(error).__name__}); the log says more"
    return None
