"""Methods that need one (activation, gradient) pair: all of them together cost one pass.

Each function takes a `Capture` and returns float32 maps (N, T, h, w), not normalised. Notation: A_k is channel k of
the activation, Z its number of pixels, g the gradient of the score, S_k = sum_ij A_kij. Where the gradient is the
same at every position (shape (N, T, K, 1, 1)) sums over positions are done in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.capture import Capture

_SPACE = (-2, -1)


def cam(capture: Capture) -> Tensor:
    """Class activation map, sum_k W_ck A_k (Zhou et al. 2016, eq. 2), signed.

    Right only for global average pooling followed by one linear layer, where W_ck = Z g_k.
    """
    return _weighted_sum(_gradient(capture).mean(_SPACE) * _pixels(capture), capture.activation)


def gradcam(capture: Capture) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2)."""
    return _weighted_sum(gradcam_weights(capture), capture.activation).relu_()


def gradcam_weights(capture: Capture) -> Tensor:
    """Weights (N, T, K) of Grad-CAM: the mean gradient of each channel."""
    return _gradient(capture).mean(_SPACE)


def gradcam_plus_plus(capture: Capture) -> Tensor:
    """Grad-CAM++ (Chattopadhay et al. 2018, eq. 10 and 19)."""
    return _weighted_sum(gradcam_plus_plus_weights(capture), capture.activation).relu_()


def gradcam_plus_plus_weights(capture: Capture) -> Tensor:
    """Weights (N, T, K) of Grad-CAM++.

    Eq. 19, alpha = g^2 / (2 g^2 + S g^3), is 1 / (2 + g S) wherever g is not 0, and the ReLU of eq. 10 drops
    g < 0, so w_k = sum over g > 0 of g / (2 + g S_k): no epsilon, no cubes, and for A >= 0 no denominator
    below 2. On signed layers the denominator can vanish; such positions get no weight.
    """
    gradient = _gradient(capture)
    total = capture.activation.sum(_SPACE)[:, None, :, None, None]
    denominator = 2 + gradient * total
    alpha = torch.where(denominator.abs() > 1e-6, denominator, torch.inf).reciprocal_()
    return alpha.mul_(gradient.clamp_min(0)).mean(_SPACE) * _pixels(capture)


def xgradcam(capture: Capture) -> Tensor:
    """XGrad-CAM (Fu et al. 2020, eq. 8)."""
    return _weighted_sum(xgradcam_weights(capture), capture.activation).relu_()


def xgradcam_weights(capture: Capture) -> Tensor:
    """Weights (N, T, K) of XGrad-CAM, sum_ij g_kij A_kij / S_k.

    A channel whose sum vanishes against the sum of its magnitudes (a dead one, or a signed one that cancels)
    gets weight 0 instead of an exploding one.
    """
    gradient, activation = _gradient(capture), capture.activation
    total = activation.sum(_SPACE)
    steady = total.abs() > 1e-6 * activation.abs().sum(_SPACE)
    share = activation / torch.where(steady, total, torch.inf)[..., None, None]
    return (gradient * share[:, None]).sum(_SPACE)


def hirescam(capture: Capture) -> Tensor:
    """HiResCAM (Draelos and Carin 2020, eq. 3), with a final ReLU like its relatives here."""
    return _inner(_gradient(capture), capture.activation).relu_()


def layercam(capture: Capture) -> Tensor:
    """LayerCAM (Jiang et al. 2021, eq. 6 and 7)."""
    return _inner(_gradient(capture).relu(), capture.activation).relu_()


def _gradient(capture: Capture) -> Tensor:
    if capture.gradient is None:
        raise ValueError("the pass was run without gradients")
    return capture.gradient


def _pixels(capture: Capture) -> int:
    return capture.activation.shape[-2] * capture.activation.shape[-1]


def _weighted_sum(weights: Tensor, activation: Tensor) -> Tensor:
    """sum_k w_k A_k: (N, T, K) and (N, K, h, w) → (N, T, h, w)."""
    n, _, h, w = activation.shape
    return torch.bmm(weights, activation.flatten(2)).view(n, -1, h, w)


def _inner(gradient: Tensor, activation: Tensor) -> Tensor:
    """sum_k g_k * A_k at each position: (N, T, K, h|1, w|1) and (N, K, h, w) → (N, T, h, w)."""
    if gradient.shape[-2:] == (1, 1):
        return _weighted_sum(gradient[..., 0, 0], activation)
    return (gradient * activation[:, None]).sum(2)
