"""Ranks of classes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from models.targets import ranked


@given(
    rows=st.lists(
        st.lists(
            st.sampled_from([-3e38, -1.5, -0.0, 0.0, 1e-45, 2.0, 3e38]), min_size=7, max_size=7
        ),
        min_size=1,
        max_size=3,
    ),
    count=st.integers(1, 9),
)
def test_the_best_classes_are_those_of_a_stable_sort(rows, count):
    scores = torch.tensor(rows)
    found = ranked(scores, scores, classes=7, task="single_label", count=count)
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert found.tolist() == expected.tolist()
