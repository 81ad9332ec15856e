"""Which networks guided backpropagation can guide as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.errors import MethodNotApplicable
from models.methods._guided import relus


@pytest.mark.parametrize(
    ("rectify", "shown"),
    [
        (lambda x: x.clamp(min=0), "clamp"),
        (lambda x: x * torch.sigmoid(x), "sigmoid"),
        (lambda x: nn.functional.hardtanh(x, -1, 1), "Hardtanh"),
        (lambda x: torch.where(x > 0, x, 0.1 * x), "where"),
        (lambda x: torch.maximum(x, 0.1 * x), "maximum"),
        (nn.functional.silu, "SiLU"),
        (lambda x: x * (x > 0), "a product with values that the image switches"),
        (lambda x: (x > 0).float() * x, "a product with values that the image switches"),
        (lambda x: x.masked_fill(x < 0, 0.0), "masked_fill"),
        (lambda x: x.clone().index_put_((x < 0,), torch.zeros(())), "mask"),
        (lambda x: (x + x.abs()) / 2, "abs"),
        (lambda x: x * (x.sign() + 1) / 2, "sign"),
    ],
)
def test_a_rectifier_beside_relu_is_refused_by_name(rectify, shown):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = rectify(nn.functional.relu(x) - 0.5)
    with pytest.raises(MethodNotApplicable, match=shown):
        relus(scores)


def test_relu6_and_gates_of_other_values_are_guided():
    x = torch.randn(2, 4, requires_grad=True)
    x = 0.5 * x * torch.rand(1, 4)
    gated = nn.functional.relu6(x) * torch.sigmoid(nn.functional.relu(x).mean(1, keepdim=True))
    assert len(relus(gated)) == 2
    # A number is no mask.
    assert len(relus(torch.ops.aten.mul.Scalar(nn.functional.relu(x), 0.125))) == 1
