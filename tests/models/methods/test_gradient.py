"""Gradient methods against hand-computed cases, identities and float64 sums written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.capture import Capture
from models.extractor import Extractor, Tap
from models.methods import METHODS, implementation, weights_implementation

GRADIENT = [name for name, row in METHODS.items() if row.family == "gradient"]
FREE = ["cam", "gradcam", "gradcam_plus_plus", "xgradcam", "hirescam", "layercam"]


def capture(net, x, layer, targets) -> Capture:
    """(A, g) of a layer for the same targets of every image."""
    with Extractor(net, [Tap(layer, "output"), Tap(layer, "grad_output")]) as extractor:
        logits = extractor.forward(x)
        gradients = []
        for t in targets:
            extractor.backward(logits[:, t].sum(), again=True)
            gradients.append(extractor.caught(layer, "grad_output"))
        activation = extractor.caught(layer, "output")
    return Capture(layer, activation, torch.stack(gradients, 1), logits[:, list(targets)].detach())


# Worked out by hand for the network of captum's tests: A = [0 4; 31 40], [0 0; 6 15] and
# g = [1 1; 1 1], [1 -1; -1 -1] at relu1, y = 54.
BY_HAND = {
    "gradcam": [0, 4, 28, 32.5],
    "hirescam": [0, 4, 25, 25],
    "layercam": [0, 4, 31, 40],
    "xgradcam": [0, 4, 25, 25],
    "gradcam_plus_plus": [0, 0.20779, 1.87126, 2.73010],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name, hand_net, hand_input):
    maps = implementation(name)(capture(hand_net, hand_input, "relu1", [0]))
    np.testing.assert_allclose(maps.flatten(), BY_HAND[name], atol=2e-5)


def test_gradcam_at_a_signed_layer_by_hand(hand_net, hand_input):
    maps = implementation("gradcam")(capture(hand_net, hand_input, "conv1", [0]))
    np.testing.assert_allclose(maps.flatten(), [11.25, 13.5, 20.25, 22.5])


def test_weights_by_hand(hand_net, hand_input):
    caught = capture(hand_net, hand_input, "relu1", [0])
    expected = {"gradcam": [1, -0.5], "xgradcam": [1, -1], "gradcam_plus_plus": [4 / 77, 1 / 23]}
    for name, weights in expected.items():
        found = weights_implementation(name)(caught)
        np.testing.assert_allclose(found[0, 0], weights, rtol=1e-5)


def test_identities_of_pooled_linear_heads(pool_net, images):
    """CAM/Z = HiRes = XGrad = Grad before the ReLU, and sum HiRes + bias is the logit."""
    targets = [0, 3]
    caught = capture(pool_net, images, "out", targets)
    pixels = caught.activation.shape[-1] * caught.activation.shape[-2]
    cam = implementation("cam")(caught)
    for name in ("gradcam", "hirescam", "xgradcam"):
        torch.testing.assert_close(implementation(name)(caught), (cam / pixels).relu())
    torch.testing.assert_close((cam / pixels).sum((2, 3)) + pool_net.fc.bias[targets], caught.score)
    expected = torch.einsum("tk,nkhw->nthw", pool_net.fc.weight[targets], caught.activation)
    torch.testing.assert_close(cam, expected)


def test_plus_plus_closed_form_of_pooled_linear_heads(pool_net, images):
    caught = capture(pool_net, images, "out", [2])
    found = weights_implementation("gradcam_plus_plus")(caught)[:, 0]
    weight, pooled = pool_net.fc.weight[2], caught.activation.mean((2, 3))
    torch.testing.assert_close(found, weight.relu() / (2 + weight * pooled))


def test_xgradcam_conserves_the_score(flat_net, images):
    """sum M = sum g * A before the ReLU, whatever the head."""
    caught = capture(flat_net, images, "out", [0, 4])
    weights = weights_implementation("xgradcam")(caught)
    maps = torch.einsum("ntk,nkhw->nthw", weights, caught.activation)
    expected = (caught.gradient * caught.activation[:, None]).sum((2, 3, 4))
    torch.testing.assert_close(maps.sum((2, 3)), expected, rtol=1e-4, atol=1e-5)


def by_definition(name: str, a: np.ndarray, g: np.ndarray) -> np.ndarray:
    """One image, one target, float64: the papers' formulas with loops over channels."""
    out = np.zeros(a.shape[1:])
    for k in range(len(a)):
        if name == "gradcam":
            out += g[k].mean() * a[k]
        elif name == "xgradcam":
            out += (g[k] * a[k]).sum() / a[k].sum() * a[k] if a[k].sum() > 0 else 0
        elif name == "hirescam":
            out += g[k] * a[k]
        elif name == "layercam":
            out += np.maximum(g[k], 0) * a[k]
        else:
            eq19 = np.zeros_like(g[k])
            nonzero = g[k] != 0
            g2, g3 = g[k] ** 2, g[k] ** 3
            eq19[nonzero] = g2[nonzero] / (2 * g2[nonzero] + a[k].sum() * g3[nonzero])
            out += (eq19 * np.maximum(g[k], 0)).sum() * a[k]
    return np.maximum(out, 0)


@pytest.mark.parametrize("name", [n for n in FREE if n != "cam"])
@given(
    n=st.integers(1, 3),
    t=st.integers(1, 3),
    k=st.integers(1, 5),
    side=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_by_definition(name, n, t, k, side, seed):
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(n, k, side, side, generator=rng).relu()
    g = torch.randn(n, t, k, side, side, generator=rng)
    g[torch.rand(g.shape, generator=rng) < 0.3] = 0
    # Exponent spread: real gradients are about 1e-4, where an additive epsilon would take over.
    g *= 10.0 ** torch.randint(-5, 1, (1,), generator=rng)
    maps = implementation(name)(Capture("x", a, g, torch.zeros(n, t)))
    for i in range(n):
        for j in range(t):
            expected = by_definition(name, a[i].double().numpy(), g[i, j].double().numpy())
            # Terms may cancel: the error of the sum is then a few roundings of its terms.
            terms = float((g[i, j] * a[i]).abs().sum(0).max())
            atol = 1e-5 * max(1e-9, np.abs(expected).max()) + 2.0**-21 * terms
            np.testing.assert_allclose(maps[i, j], expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", FREE)
def test_constant_gradients_in_short_form_give_the_same_maps(name):
    rng = torch.Generator().manual_seed(5)
    a = torch.randn(2, 6, 3, 4, generator=rng).relu()
    short = torch.randn(2, 3, 6, 1, 1, generator=rng)
    long = short.expand(2, 3, 6, 3, 4).contiguous()
    method = implementation(name)
    torch.testing.assert_close(
        method(Capture("x", a, short, torch.zeros(2, 3))),
        method(Capture("x", a, long, torch.zeros(2, 3))),
    )


@pytest.mark.parametrize("name", FREE)
def test_dead_and_cancelling_channels_stay_finite(name):
    a = torch.zeros(1, 3, 2, 2)
    a[0, 1] = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    a[0, 2, 0, 0] = 1e-30
    g = torch.ones(1, 1, 3, 2, 2)
    maps = implementation(name)(Capture("x", a, g, torch.zeros(1, 1)))
    assert maps.isfinite().all()
    assert maps.abs().max() < 10
