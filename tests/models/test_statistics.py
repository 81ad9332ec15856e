"""Statistics against numpy in float64."""

from __future__ import annotations

import importlib.util
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import native
from models.reductions import NUMBERS, SUBSAMPLE, reduce
from models.statistics import describe, summarise


@pytest.fixture(params=["native", "torch"], scope="module", autouse=True)
def _ways(request):
    """Everything here holds for the native code and without it."""
    if request.param == "torch":
        with mock.patch.object(native, "_function", return_value=None):
            yield
    elif native._function() is None:
        pytest.skip("reductions.c is not built")
    else:
        yield


def tensor(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values = values.relu() if seed % 2 else values
    if len(shape) > 2:
        values[:, 0] = 0  # a dead channel
    return values


@given(
    n=st.integers(1, 3),
    channels=st.integers(2, 9),
    side=st.integers(1, 12),
    seed=st.integers(0, 99),
    memory=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_statistics_equal_numpy(n, channels, side, seed, memory, dtype):
    values = tensor((n, channels, side, side), seed).to(dtype, memory_format=memory)
    (summaries,) = summarise([reduce(values)])
    for row in range(n):
        found = describe(summaries[row], layer="x", kind="output", top=3)
        expected = values[row].double().numpy()
        assert found.shape == expected.shape
        np.testing.assert_allclose(found.mean, expected.mean(), atol=1e-6)
        np.testing.assert_allclose(found.std, expected.std(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.l2, np.linalg.norm(expected), rtol=1e-5)
        assert found.min == expected.min()
        assert found.max == expected.max()
        assert found.sparsity == pytest.approx((expected == 0).mean())
        assert found.dead_channels == (expected == 0).all((1, 2)).sum()
        q = found.quantiles
        np.testing.assert_allclose(
            [q.p01, q.p25, q.p50, q.p75, q.p99],
            np.quantile(expected, [0.01, 0.25, 0.5, 0.75, 0.99]),
            atol=1e-5,
        )
        order = np.argsort(-expected.mean((1, 2)), kind="stable")[:3]
        assert [c.index for c in found.top_channels] == order.tolist()


def test_quantiles_of_large_tensors_come_from_an_even_subsample():
    values = torch.rand(1, 64, 40, 40, generator=torch.Generator().manual_seed(0))
    assert values[0].numel() > 10 * SUBSAMPLE
    found = describe(summarise([reduce(values)])[0][0], layer="x", kind="output", top=1).quantiles
    np.testing.assert_allclose(
        [found.p01, found.p25, found.p50, found.p75, found.p99],
        [0.01, 0.25, 0.5, 0.75, 0.99],
        atol=0.03,
    )


@pytest.mark.parametrize("shape", [(2, 7, 5), (2, 4, 4, 5)])
def test_token_layouts_keep_channels_last(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = describe(
        summarise([reduce(values, channels_last=True)])[0][1], layer="x", kind="output", top=5
    )
    means = values[1].double().numpy().reshape(-1, 5).mean(0)
    assert found.shape == shape[1:]
    assert [c.index for c in found.top_channels] == np.argsort(-means, kind="stable").tolist()
    np.testing.assert_allclose(found.mean, means.mean(), atol=1e-6)


def test_vectors_have_one_value_a_channel():
    values = torch.tensor([[1.0, 0.0, -2.0]])
    found = describe(summarise([reduce(values)])[0][0], layer="fc", kind="output", top=2)
    assert (found.mean, found.dead_channels, found.sparsity) == (
        pytest.approx(-1 / 3),
        1,
        pytest.approx(1 / 3),
    )
    assert [c.index for c in found.top_channels] == [0, 1]


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 4, 4), (2, 5, 64, 64)])
def test_what_follows_may_overwrite_the_tensor(shape):
    """As a ReLU does that works in place."""
    values = tensor(shape, 0)
    (expected,) = summarise([reduce(values.clone())])
    reductions = reduce(values)
    values.fill_(7.0)
    (found,) = summarise([reductions])
    for a, b in zip(found, expected, strict=True):
        assert describe(a, layer="x", kind="output", top=5) == describe(
            b, layer="x", kind="output", top=5
        )


@given(
    means=st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1.0, 3.5]), min_size=1, max_size=9),
    top=st.integers(1, 9),
)
def test_channels_of_equal_means_are_listed_in_their_order(means, top):
    values = torch.tensor([means, means[::-1]])
    for row, summary in zip(values.numpy(), summarise([reduce(values)])[0], strict=True):
        found = describe(summary, layer="fc", kind="output", top=top).top_channels
        expected = np.argsort(-row, kind="stable")[:top]
        assert [c.index for c in found] == expected.tolist()
        assert [c.mean for c in found] == row[expected].tolist()


def test_gradients_list_channels_by_magnitude():
    values = torch.tensor([[1.0, 0.0, -2.0]])
    found = describe(summarise([reduce(values)])[0][0], layer="fc", kind="grad_output", top=1)
    assert [c.index for c in found.top_channels] == [2]


def test_grids_and_weights_follow_the_top_channels():
    values = tensor((1, 5, 3, 3), 1)
    weights = np.arange(5.0)
    found = describe(
        summarise([reduce(values, keep_maps=True)])[0][0],
        layer="x",
        kind="output",
        top=2,
        weights=weights,
        grid=True,
    )
    assert found.grid is not None
    for channel, picture in zip(found.top_channels, found.grid, strict=True):
        assert channel.weight == channel.index
        np.testing.assert_array_equal(picture, values[0, channel.index].numpy())


def test_half_precision_is_reduced_in_float32():
    values = torch.full((1, 1, 300, 300), 2.0, dtype=torch.bfloat16)
    found = describe(summarise([reduce(values)])[0][0], layer="x", kind="output", top=1)
    assert found.l2 == pytest.approx(600.0, rel=1e-5)
    assert found.std == pytest.approx(0.0, abs=1e-3)


# In rows of several positions, with positions and channels left over, and without.
@pytest.mark.parametrize(
    "shape", [(2, 24, 5, 7), (3, 32, 112, 112), (2, 5, 96, 96), (1, 40, 61, 61)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, -9.0], ids=["signed", "negative"])
def test_large_layers_equal_numpy(shape, dtype, shift):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    # Channels of all kinds: dead, without a value above 0, and from 0 on.
    values[:, 1], values[:, 2] = 0, values[:, 2].relu()
    values = (values + shift).to(dtype, memory_format=torch.channels_last)
    found = reduce(values).found
    exact = values.double().flatten(2).numpy()
    means, maxima = found[:, NUMBERS:].chunk(2, 1)
    np.testing.assert_allclose(means, exact.mean(2), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(maxima, exact.max(2))
    images = exact.reshape(len(exact), -1)
    mean, std, low, high, norm, zeros, dead = found[:, :7].T
    np.testing.assert_allclose(mean, images.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std, images.std(1), rtol=1e-5)
    np.testing.assert_array_equal(low, images.min(1))
    np.testing.assert_array_equal(high, images.max(1))
    np.testing.assert_allclose(norm, np.linalg.norm(images, axis=1), rtol=1e-5)
    np.testing.assert_allclose(zeros, (images == 0).mean(1), rtol=1e-6)
    np.testing.assert_array_equal(dead, (exact == 0).all(2).sum(1))


# As gradients of certain predictions are, and networks that have gone astray.
@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_whose_squares_float32_does_not_hold(scale, dtype):
    values = (tensor((2, 24, 9, 9), 0) * scale).to(dtype, memory_format=torch.channels_last)
    for row, image in zip(reduce(values).found, values.double().flatten(1).numpy(), strict=True):
        np.testing.assert_allclose(row[1], image.std(), rtol=1e-5)
        np.testing.assert_allclose(row[4], np.linalg.norm(image), rtol=1e-5)


@pytest.mark.parametrize("odd", [-0.0, float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_half_precision_counts_odd_values_as_float32_does(odd):
    values = tensor((2, 6, 8, 8), 1).bfloat16().contiguous(memory_format=torch.channels_last)
    values[1, 3, 2, 2] = odd
    np.testing.assert_allclose(reduce(values).found, reduce(values.float()).found, rtol=1e-6)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_native_code_was_built():
    assert importlib.util.find_spec("models._reductions") is not None
