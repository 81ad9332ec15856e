"""What methods that know only some kinds of models say to a model, found out once when it is loaded."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from models.errors import MethodNotApplicable
from models.layers import Layouts
from models.methods import METHODS
from models.methods._attention import verify_transformer
from models.methods._guided import relus
from models.methods._lrp import Explained, relevance
from models.probe import Trace
from models.targets import ResolvedTarget
from models.types import Task


def refusals(
    module: nn.Module, traced: Trace, layouts: Layouts, *, task: Task, probe: Tensor
) -> dict[str, str]:
    """Try the methods whose rules are proved model by model, on one picture of a probe.

    Guided backpropagation looks for ReLUs in the recorded graph, LRP for conservation of relevance, and attention
    methods for attention that they reproduce.

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
    explained = Explained(
        module=module,
        task=task,
        inputs=picture,
        low=picture.amin().expand_as(picture),
        high=picture.amax().expand_as(picture),
        logits=traced.scores[0].detach(),
    )
    guided = _refusal(lambda: relus(traced.scores))
    conserving = _refusal(lambda: relevance(explained, [ResolvedTarget(0)]))
    attentive = _refusal(lambda: verify_transformer(module, layouts, picture))
    reasons = {"guided_backprop": guided, "guided_gradcam": guided, "lrp": conserving}
    reasons |= {name: attentive for name, row in METHODS.items() if row.family == "transformer"}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _refusal(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except MethodNotApplicable as error:
        return error.message[0].lower() + error.message[1:].rstrip(".")
    return None
