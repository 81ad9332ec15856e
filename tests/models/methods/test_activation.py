"""Activation methods against decompositions in float64, peers, and hand-computed cases."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import KernelPCA

from models.capture import Capture
from models.compat import define_missing_operators
from models.methods import METHODS, implementation
from models.methods.activation import KPCA_SIDE, eigencam, eigengradcam, fem, kpca_cam

define_missing_operators()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pytorch_grad_cam.utils import svd_on_activations as peer

NAMES = ["eigencam", "eigengradcam", "kpca_cam", "fem"]
CLASSLESS = ["eigencam", "kpca_cam", "fem"]


def random_capture(n=2, t=2, k=5, h=3, w=4, seed=0, signed=False) -> Capture:
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(n, k, h, w, generator=rng)
    g = torch.randn(n, t, k, h, w, generator=rng) * 1e-3
    return Capture("x", a if signed else a.relu(), g, torch.zeros(n, t))


def first_component(matrix: np.ndarray) -> np.ndarray:
    """A v_1 by a full singular value decomposition in float64."""
    _, _, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=True)
    return matrix @ vt[0]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def assert_same_up_to_sign(found, expected, atol) -> None:
    found, expected = np.asarray(found).ravel(), np.asarray(expected).ravel()
    sign = np.sign(found @ expected) or 1.0
    np.testing.assert_allclose(found, sign * expected, atol=atol, rtol=0)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("k", "h", "w"), [(20, 3, 4), (5, 4, 4), (3, 7, 6), (16, 4, 4), (1, 2, 2)])
def test_eigencam_is_the_first_singular_component(k, h, w, signed):
    capture = random_capture(k=k, h=h, w=w, signed=signed)
    for a, m in zip(capture.activation, eigencam(capture), strict=True):
        assert_same_up_to_sign(m[0], first_component(a.flatten(1).T.numpy()), atol=1e-5)
        guide = a.sum(0).numpy()
        assert correlation(m[0].numpy(), guide) > -1e-3


def test_eigencam_by_hand():
    """A = [3 0; 0 0], [4 0; 0 0] plus an orthogonal 1 at the end: the component is 5 at first."""
    a = torch.zeros(1, 3, 2, 2)
    a[0, 0, 0, 0], a[0, 1, 0, 0], a[0, 2, 1, 1] = 3, 4, 1
    maps = eigencam(Capture("x", a, None, torch.zeros(1, 2)))
    torch.testing.assert_close(maps, torch.tensor([[5.0, 0], [0, 0]]).expand(1, 2, 2, 2))


def test_eigencam_has_no_random_sign():
    """Negating what LAPACK returns must not show; else half of the random maps would turn."""
    for seed in range(20):
        capture = random_capture(n=1, seed=seed, signed=True)
        m, guide = eigencam(capture)[0, 0].numpy(), capture.activation[0].sum(0).numpy()
        assert correlation(m, guide) >= -1e-6


def test_eigencam_of_nonnegative_activations_is_nonnegative():
    """Perron: the first component of a nonnegative matrix is; the rule for the sign must agree."""
    for seed in range(20):
        assert eigencam(random_capture(seed=seed)).min() >= -1e-6


def test_eigencam_differs_from_the_centred_peer_by_its_centring():
    """pytorch-grad-cam takes the mean over positions out first, which is not in the paper."""
    a = random_capture(n=3, k=9).activation
    centred = a - a.mean((2, 3), keepdim=True)
    theirs = peer.get_2d_projection(a.numpy())
    ours = eigencam(Capture("x", centred, None, torch.zeros(3, 1)))[:, 0]
    for m, expected in zip(ours, theirs, strict=True):
        assert_same_up_to_sign(m, expected, atol=1e-5)
    uncentred = eigencam(Capture("x", a, None, torch.zeros(3, 1)))[:, 0]
    assert not np.allclose(uncentred.abs().numpy(), np.abs(theirs), atol=1e-2)


def test_eigengradcam_is_the_first_component_of_the_weighted_activation():
    capture = random_capture(n=3, t=2, k=12)
    maps = eigengradcam(capture)
    for i in range(3):
        for t in range(2):
            b = (capture.gradient[i, t] * capture.activation[i]).flatten(1).T.numpy()
            expected, guide = first_component(b), b.sum(1)
            if np.cov(expected, guide)[0, 1] < 0:
                expected = -expected
            np.testing.assert_allclose(maps[i, t].flatten(), expected, atol=1e-8)
    assert maps.max() > 0


def test_eigengradcam_of_one_channel_is_that_channel():
    """There is nothing to decompose, and evidence keeps its sign, negative or not."""
    capture = random_capture(k=1)
    for gradient in (capture.gradient, -capture.gradient.abs()):
        found = eigengradcam(replace(capture, gradient=gradient))
        torch.testing.assert_close(found, gradient[:, :, 0] * capture.activation)


def test_kpca_is_sklearns_with_the_authors_defaults():
    capture = random_capture(n=4, k=7, h=4, w=5)
    for a, m in zip(capture.activation, kpca_cam(capture), strict=True):
        x = a.flatten(1).T.double().numpy()
        x = x - x.mean(0)
        expected = KernelPCA(n_components=1, kernel="sigmoid").fit_transform(x)
        assert_same_up_to_sign(m[0], expected, atol=1e-5)
        assert correlation(m[0].numpy(), a.sum(0).numpy()) >= 0


def test_kpca_is_the_peers_map():
    capture = random_capture(n=3, k=9, h=4, w=4)
    theirs = peer.get_2d_projection_kernel(capture.activation.numpy())
    for m, expected in zip(kpca_cam(capture), theirs, strict=True):
        assert_same_up_to_sign(m[0], expected, atol=1e-4)


def test_kpca_averages_big_layers_down():
    side = KPCA_SIDE
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, side, side, generator=rng)
    big = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = kpca_cam(Capture("x", coarse, None, torch.zeros(1, 1)))
    found = kpca_cam(Capture("x", big, None, torch.zeros(1, 1)))
    torch.testing.assert_close(found, expected)


def test_fem_by_hand():
    """Channel 0: 8 is above 1 + 2 sqrt(7) = 6.29. Channel 1: nothing is. Channel 2: flat."""
    a = torch.zeros(1, 3, 2, 4)
    a[0, 0, 1, 2] = 8
    a[0, 1] = torch.tensor([[4.0, 4, 4, 4], [0, 0, 0, 0]])
    a[0, 2] = 0.1
    expected = torch.zeros(2, 4)
    expected[1, 2] = 1
    torch.testing.assert_close(fem(Capture("x", a, None, torch.zeros(1, 1)))[0, 0], expected)


def test_fem_by_the_authors_loop():
    """Their code: sum of binary maps of values above mean + 2 deviations, times the mean."""
    capture = random_capture(n=2, k=30, h=7, w=7)
    for a, m in zip(capture.activation.double().numpy(), fem(capture), strict=True):
        expected = np.zeros((7, 7))
        for channel in a:
            expected += channel.mean() * (channel > channel.mean() + 2 * channel.std())
        np.testing.assert_allclose(m[0], expected, rtol=1e-5)
    # Weighting the channel itself by the share of rare positions, as one peer does, is another
    # method.
    share = (capture.activation > _threshold(capture.activation)).float().mean((2, 3), keepdim=True)
    assert (
        correlation((share * capture.activation).sum(1)[0].numpy(), fem(capture)[0, 0].numpy())
        < 0.99
    )


def _threshold(a: torch.Tensor) -> torch.Tensor:
    return a.mean((2, 3), keepdim=True) + 2 * a.std((2, 3), correction=0, keepdim=True)


@pytest.mark.parametrize("name", NAMES)
@given(
    n=st.integers(1, 3),
    t=st.integers(1, 2),
    k=st.integers(1, 6),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    signed=st.booleans(),
)
def test_properties(name, n, t, k, h, w, seed, signed):
    """Finite, of the layer's shape, and for a batch what each image has alone."""
    capture = random_capture(n, t, k, h, w, seed, signed)
    maps = implementation(name)(capture)
    assert maps.shape == (n, t, h, w)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    if n > 1:
        alone = implementation(name)(capture.rows(torch.tensor([n - 1])))
        # Below four positions or channels components can be all but equal, and then either is
        # right.
        if name == "fem" or min(k, h * w) == 1:
            torch.testing.assert_close(alone[0], maps[-1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_batch_equals_singles(name):
    capture = random_capture(n=4, t=2, k=12, h=5, w=5)
    maps = implementation(name)(capture)
    for i in range(4):
        alone = implementation(name)(capture.rows(torch.tensor([i])))
        torch.testing.assert_close(alone[0], maps[i], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", CLASSLESS)
def test_classless_maps_are_the_same_for_every_target(name):
    capture = random_capture(t=3)
    maps = implementation(name)(Capture("x", capture.activation, None, capture.score))
    assert not METHODS[name].needs_gradients
    assert torch.equal(maps[:, 0], maps[:, 2])


@pytest.mark.parametrize("name", NAMES)
def test_dead_layers_and_broken_neighbours(name):
    """A layer that is zero gives zeros; an image that is not finite spoils no other."""
    capture = random_capture(n=3)
    good = implementation(name)(capture)
    capture.activation[1] = 0
    capture.activation[2, 0, 0, 0] = torch.inf
    maps = implementation(name)(capture)
    assert not maps[1].any()
    torch.testing.assert_close(maps[0], good[0])


def test_eigengradcam_takes_constant_gradients_in_short_form():
    capture = random_capture(k=6)
    short = capture.gradient[..., :1, :1]
    long = short.expand_as(capture.gradient)
    expected = eigengradcam(Capture("x", capture.activation, long, capture.score))
    found = eigengradcam(Capture("x", capture.activation, short, capture.score))
    torch.testing.assert_close(found, expected)
