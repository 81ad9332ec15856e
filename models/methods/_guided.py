"""Gradients whose negative part every ReLU of the recorded graph stops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from models.errors import MethodNotApplicable
from models.extractor import Extractor
from models.hooks import HookStack
from models.steps import Subject
from models.targets import ResolvedTarget, ScoreWeights

# Rectifiers that are not ReLUs, as autograd calls them; there is no agreed way to guide them.
_OTHERS = {
    "Abs": "abs",
    "Celu": "CELU",
    "Clamp": "clamp",
    "ClampMin": "clamp",
    "Elu": "ELU",
    "Erf": "erf",
    "Gelu": "GELU",
    "Hardswish": "Hardswish",
    "LeakyRelu": "LeakyReLU",
    "IndexPut": "assignment by a mask",
    "LogSigmoid": "LogSigmoid",
    "MaskedFill": "masked_fill",
    "MaskedScatter": "masked_scatter",
    "Maximum": "maximum",
    "Minimum": "minimum",
    "Mish": "Mish",
    "Prelu": "PReLU",
    "Rrelu": "RReLU",
    "Sign": "sign",
    "Silu": "SiLU",
    "Softplus": "Softplus",
    "Threshold": "Threshold",
    "Where": "where",
}


def guided_gradients(subject: Subject, targets: Sequence[ResolvedTarget]) -> Tensor:
    """Guided gradient of each target's score at the input, float32 (T, 3, H, W).

    At a ReLU only what is positive of the gradient goes on, and only where its input was
    (Springenberg et al. 2015, eq. in section 3.4). The rule is set on the nodes of the recorded
    graph: ReLUs called as modules, as functions and in place, ReLU6 among them, are all found
    there, however often a module is called.

    Raises:
        MethodNotApplicable: the model has no ReLU, or another rectifier.
    """
    count = len(targets)
    leaf = subject.inputs.detach().repeat(count, 1, 1, 1).requires_grad_()
    changes = subject.changes(count)
    with (
        HookStack() as hooks,
        Extractor(subject.module, [], changes=changes) as extractor,
    ):
        output = extractor.forward(leaf, graph=True)
        logits, _ = subject.read(output)
        scores = ScoreWeights([[target] for target in targets], logits.device).of(logits)
        # How the output is read is no part of the model.
        for node in relus(output):
            hooks.node(node, _positive)
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    return gradient.float()


def relus(output: Tensor) -> list[Node]:
    """Nodes of all ReLUs and ReLU6s in the graph of a model's output.

    Raises:
        MethodNotApplicable: there is none, or another rectifier is among them.
    """
    found, others = [], set()
    for node in _nodes(output):
        name = node.name()
        if name.startswith("ReluBackward"):
            found.append(node)
        elif name.startswith("HardtanhBackward"):
            # ReLU6 is one that begins at 0.
            if getattr(node, "_saved_min_val", None) == 0:
                found.append(node)
            else:
                others.add("Hardtanh")
        elif name.startswith("MulBackward"):
            others |= _gates(node)
        others |= {shown for kind, shown in _OTHERS.items() if name.startswith(f"{kind}Backward")}
    if others:
        names = ", ".join(sorted(others))
        raise MethodNotApplicable(f"Guided backpropagation needs ReLU; the model has {names}.")
    if not found:
        raise MethodNotApplicable("Guided backpropagation needs ReLU; the model has none.")
    return found


def _gates(product: Node) -> set[str]:
    """Rectifiers that are written as a product: x sigmoid(x), x (x > 0)."""
    factors = [node for node, _ in product.next_functions if node is not None]
    sigmoids = [node for node in factors if node.name().startswith("SigmoidBackward")]
    if any(node.next_functions[0][0] in factors for node in sigmoids):
        return {"a product of values with their sigmoid"}
    # Of a product with values outside of the graph, these are kept for its gradient.
    kept = [getattr(product, f"_saved_{name}", None) for name in ("self", "other")]
    if len(factors) == 1 and any(isinstance(value, Tensor) and _depends(value) for value in kept):
        return {"a product with values that the image switches on and off"}
    return set()


def _depends(factor: Tensor) -> bool:
    """Whether a factor without a gradient is a mask, or differs between images."""
    if factor.dtype == torch.bool:
        return True
    return factor.ndim > 1 and len(factor) > 1 and bool((factor != factor[:1]).any())


def _positive(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(gradient.clamp_min(0) for gradient in gradients)


def _nodes(output: Tensor) -> Iterator[Node]:
    """Every node of a graph, once."""
    waiting = [output.grad_fn]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [before for before, _ in node.next_functions]
