"""What methods that know only some kinds of models say to a model, found out once when it is loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.errors import MethodNotApplicable
from models.layers import Layouts
from models.methods import METHODS
from models.methods._attention_gradients import verify_transformer
from models.methods._fullgrad import obstacle
from models.methods._guided import relus
from models.methods._lrp import Explained, relevance
from models.probe import Trace
from models.targets import ResolvedTarget, class_scores
from models.types import Task

_SMALL_SIDE = 96
"""Pixels of the picture on which relevance is tried: what a model computes does not depend on its input's size."""


def refusals(
    module: nn.Module, traced: Trace, layouts: Layouts, *, task: Task, probe: Tensor
) -> dict[str, str]:
    """Try the methods whose rules are proved model by model, on one picture of a probe.

    Guided backpropagation looks for ReLUs in the recorded graph, LRP for conservation of relevance
    (on a small picture where the model takes one), attention methods for attention that they
    reproduce, FullGrad for biases that it cannot account for.

    Args:
        module: in eval mode, parameters frozen, float32.
        traced: its trace on `probe`.
        layouts: of its layers.
        task: how its output is read as scores.
        probe: (N, 3, H, W), what was traced.

    Returns:
        The reason, as a clause, by name of each method that cannot explain the model.
    """
    picture = probe[:1]
    guided = _refusal(lambda: relus(traced.scores))
    conserving = _refusal(lambda: relevance(_explained(module, task, picture), [ResolvedTarget(0)]))
    attentive = _refusal(lambda: verify_transformer(module, layouts, picture))
    reasons = {"guided_backprop": guided, "guided_gradcam": guided, "lrp": conserving}
    reasons["fullgrad"] = obstacle(module)
    reasons |= {name: attentive for name, row in METHODS.items() if row.family == "transformer"}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _explained(module: nn.Module, task: Task, picture: Tensor) -> Explained:
    """The picture made small, or itself where the model does not take a small one."""
    small = nn.functional.interpolate(picture, (_SMALL_SIDE, _SMALL_SIDE), mode="nearest")
    with torch.no_grad():
        try:
            logits, _ = class_scores(module(small), task)
        except Exception:  # noqa: BLE001  (models that insist on their input's size say so in many ways)
            small = picture
            logits, _ = class_scores(module(picture), task)
    return Explained(
        module=module,
        task=task,
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
    return None
