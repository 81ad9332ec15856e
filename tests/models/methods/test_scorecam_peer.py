"""Score-CAM beside pytorch-grad-cam's: the same map by its convention, nearly the same by ours."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from models.compat import define_missing_operators
from models.methods import implementation

define_missing_operators()
import torchvision  # noqa: E402  (its operators come first)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_grad_cam as peer
    import pytorch_grad_cam.score_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

LAYER = "layer2"


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """ResNet-18 with the spread of scores of a trained one; fresh ones score masks alike."""
    torch.manual_seed(3)
    built = torchvision.models.resnet18(weights=None, num_classes=10)
    built.fc.weight.data.mul_(20)
    return built.eval().requires_grad_(False)


def theirs(net: nn.Module, x: torch.Tensor, target: int) -> torch.Tensor:
    """Its map at the layer's resolution, after its ReLU, before any scaling."""
    layer = net.get_submodule(LAYER)
    with peer.ScoreCAM(model=net, target_layers=[layer]) as cam:
        with torch.no_grad():
            net(x)
        activation = cam.activations_and_grads.activations[0].numpy()
        raw = cam.get_cam_image(x, layer, [ClassifierOutputTarget(target)], activation, None, False)
    return torch.from_numpy(raw[0]).relu()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(pytorch_grad_cam.score_cam.tqdm, "tqdm", lambda items: items)


def test_scorecam_of_pytorch_grad_cam(net, drive, subject_of, monkeypatch):
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = nn.functional.interpolate(x, (64, 64), mode="bicubic")
    subject = subject_of(net, x, [4], LAYER, gradients=False, chunk=16)
    found = drive(implementation("scorecam")(subject), subject).maps[0]
    # Its masks are enlarged corner to corner, its maps and all others pixel centre to pixel centre.
    correlation, _ = spearmanr(found.flatten(), theirs(net, x, 4).flatten())
    assert 0.95 <= correlation < 1.0

    centred = functools.partial(nn.Upsample, mode="bilinear", align_corners=False)
    monkeypatch.setattr(nn, "UpsamplingBilinear2d", centred)
    expected = theirs(net, x, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=float(1e-4 * expected.max()))
