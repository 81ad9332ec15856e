"""What is known of the part of a model that follows the explained layer."""

from __future__ import annotations

from torch import Tensor

from models.steps import Subject


def linear_head(subject: Subject) -> Tensor | None:
    """Weight (classes, K) of a head that is exactly global average pooling and one linear layer.

    None for other heads and layers, and where interventions may change what follows the layer.
    """
    if subject.interventions or subject.layer != subject.warm.target_layer:
        return None
    return subject.warm.head.weight
