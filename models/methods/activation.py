"""Methods that decompose or threshold the activation of one layer; most know nothing of the class.

Each function takes a `Capture` and returns float32 maps (N, T, h, w), not normalised. Maps that do
not depend on the class are the same for all T targets. Notation: A is the activation of one image
as a matrix of h·w positions by K channels, A_k its channel k, g the gradient of the score.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.capture import Capture

KPCA_SIDE = 28
"""Most rows and columns of a layer that `kpca_cam` takes as they are."""


def eigencam(capture: Capture) -> Tensor:
    """Eigen-CAM (Muhammad and Yeasin 2020, section III), A v_1.

    v_1 is the first right singular vector of A. Not centred, as in the paper. The sign that a
    decomposition leaves open is the one that correlates with sum_k A_k.
    """
    maps = _first_component(capture.activation)
    return _for_each_target(_oriented(maps, capture.activation.sum(1)), capture)


def eigengradcam(capture: Capture) -> Tensor:
    """Eigen-Grad-CAM: Eigen-CAM of B = g * A, that is B v_1.

    From pytorch-grad-cam, without its centring and its ReLU, which empties maps whose evidence is
    negative throughout. The sign is the one that correlates with sum_k g_k A_k, so that more is
    more evidence for the class.
    """
    if capture.gradient is None:
        raise ValueError("the pass was run without gradients")
    targets = []
    for t in range(capture.score.shape[1]):
        weighted = capture.gradient[:, t] * capture.activation
        targets.append(_oriented(_first_component(weighted), weighted.sum(1)))
    return torch.stack(targets, 1)


def kpca_cam(capture: Capture) -> Tensor:
    """KPCA-CAM (Karmani et al. 2024): the first component of kernel PCA over the positions of A.

    The kernel is the authors' default: tanh(x·y / K + 1) of channel vectors x, y from which the
    mean over positions is taken. The sign is the one that correlates with sum_k A_k. Layers of more
    than 28 rows or columns are averaged down to 28, since the work grows with the third power of
    the number of positions.
    """
    activation = capture.activation
    height, width = activation.shape[-2:]
    size = (min(height, KPCA_SIDE), min(width, KPCA_SIDE))
    if size != (height, width):
        activation = nn.functional.adaptive_avg_pool2d(activation, size)
    rows = _finite(activation).flatten(2).mT.double()
    rows = rows - rows.mean(1, keepdim=True)
    kernel = torch.tanh(rows @ rows.mT / rows.shape[2] + 1)
    across = kernel.mean(1, keepdim=True)
    # The kernel's own mean is taken in feature space, so that its first component is one of
    # variation.
    centred = kernel - across - across.mT + kernel.mean((1, 2), keepdim=True)
    maps = _top(centred).float().view(-1, *size)
    return _for_each_target(_oriented(maps, activation.sum(1)), capture)


def fem(capture: Capture) -> Tensor:
    """Feature explanation method (Fuad et al. 2020): sum_k mu_k B_k.

    B_k is 1 where A_k is above mu_k + 2 sigma_k, else 0, with mean mu_k and standard deviation
    sigma_k over the positions of channel k. A channel that is the same everywhere has no such
    position.
    """
    variance, mean = torch.var_mean(capture.activation, (2, 3), correction=0, keepdim=True)
    rare = capture.activation > mean + 2 * variance.sqrt()
    return _for_each_target((mean * rare).sum(1), capture)


def _first_component(activation: Tensor) -> Tensor:
    """A v_1 for each image of (N, K, h, w), from A's smaller Gram matrix: (N, h, w)."""
    columns = _finite(activation).flatten(2).double()
    if columns.shape[2] <= columns.shape[1]:
        component = _top(columns.mT @ columns)
    else:
        _, vectors = torch.linalg.eigh(columns @ columns.mT)
        component = (vectors[..., -1:].mT @ columns)[:, 0]
    return component.float().view(-1, *activation.shape[-2:])


def _top(matrices: Tensor) -> Tensor:
    """Greatest eigenvector (N, n) of symmetric (N, n, n), times the root of its eigenvalue."""
    values, vectors = torch.linalg.eigh(matrices)
    scaled: Tensor = vectors[..., -1] * values[:, -1:].clamp_min(0).sqrt()
    return scaled


def _finite(tensor: Tensor) -> Tensor:
    """Zeros for what is not finite, on which a decomposition fails for the whole batch."""
    return tensor.nan_to_num(0.0, 0.0, 0.0)


def _oriented(maps: Tensor, guide: Tensor) -> Tensor:
    """Maps (N, h, w) with the sign that correlates with `guide`, or else that of their peak."""
    flat, guides = maps.flatten(1).double(), guide.flatten(1).double()
    flat = flat - flat.mean(1, keepdim=True)
    guides = guides - guides.mean(1, keepdim=True)
    together = (flat * guides).sum(1)
    tiny = 1e-6 * flat.norm(dim=1) * guides.norm(dim=1)
    extremes = maps.amax((1, 2)) + maps.amin((1, 2))
    negative = torch.where(together.abs() > tiny, together, extremes) < 0
    return torch.where(negative[:, None, None], -maps, maps)


def _for_each_target(maps: Tensor, capture: Capture) -> Tensor:
    """The same map (N, h, w) for each of the capture's T targets."""
    return maps[:, None].expand(-1, capture.score.shape[1], -1, -1)
