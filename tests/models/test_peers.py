"""The maps of pytorch-grad-cam and captum: equal, or different by how much and why."""

from __future__ import annotations

import warnings

import pytest
import torch
from captum.attr import LayerGradCam

from models.capture import Capture
from models.compat import define_missing_operators
from models.extractor import Extractor, Tap
from models.methods import implementation

define_missing_operators()
import timm  # noqa: E402  (torchvision's operators come first)
import torchvision  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_grad_cam as peer
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

SIDE = 96
NETS = {
    "resnet18": "layer4",
    "tf_efficientnet_lite0": "bn2",
    "densenet121": "features",
    "vgg11": "features.19",
}
PEERS = {
    "gradcam": "GradCAM",
    "xgradcam": "XGradCAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "gradcam_plus_plus": "GradCAMPlusPlus",
}
TARGETS = [7, 0]


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name.startswith("tf_"):
        net = timm.create_model(name, num_classes=20)
    else:
        extra = {"init_weights": True} if name == "vgg11" else {}
        net = getattr(torchvision.models, name)(weights=None, num_classes=20, **extra)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def nets() -> dict[str, torch.nn.Module]:
    return {name: build(name) for name in NETS}


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def ours(net: torch.nn.Module, layer: str, x: torch.Tensor) -> Capture:
    with Extractor(net, [Tap(layer, "output"), Tap(layer, "grad_output")]) as extractor:
        logits = extractor.forward(x)
        scores = logits.gather(1, torch.tensor(TARGETS)[:, None])
        extractor.backward(scores.sum())
        gradient = extractor.caught(layer, "grad_output")
        activation = extractor.caught(layer, "output")
    return Capture(layer, activation, gradient[:, None], scores.detach())


def theirs(name: str, net: torch.nn.Module, layer: str, x: torch.Tensor) -> torch.Tensor:
    """pytorch-grad-cam's map at the layer's resolution, after its ReLU, before any scaling."""
    module = net.get_submodule(layer)
    net.requires_grad_(True)  # it needs a graph from the first parameter on
    try:
        with getattr(peer, PEERS[name])(model=net, target_layers=[module]) as cam:
            targets = [ClassifierOutputTarget(t) for t in TARGETS]
            cam(input_tensor=x, targets=targets)
            store = cam.activations_and_grads
            raw = cam.get_cam_image(
                x, module, targets, store.activations[0].numpy(), store.gradients[0].numpy(), False
            )
    finally:
        net.requires_grad_(False)
        for parameter in net.parameters():
            parameter.grad = None
    return torch.from_numpy(raw).relu()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("net_name", ["resnet18", "tf_efficientnet_lite0", "vgg11"])
@pytest.mark.parametrize("name", ["gradcam", "xgradcam", "hirescam", "layercam"])
def test_pytorch_grad_cam(name, net_name, nets, pictures):
    net, layer = nets[net_name], NETS[net_name]
    found = implementation(name)(ours(net, layer, pictures))[:, 0]
    assert relative(found, theirs(name, net, layer, pictures)) < 1e-4


@pytest.mark.parametrize("name", ["gradcam", "hirescam", "layercam"])
def test_pytorch_grad_cam_keeps_what_densenet_overwrites(name, nets, pictures):
    """On the CPU its saved activation is overwritten by DenseNet's in-place ReLU.

    Its map is then that of the activation after the ReLU with the gradient before it. Ours takes
    both before; given the overwritten activation, our formula gives its map.
    """
    net, layer = nets["densenet121"], NETS["densenet121"]
    caught = ours(net, layer, pictures)
    expected = theirs(name, net, layer, pictures)
    assert (caught.activation < 0).any()
    overwritten = Capture(layer, caught.activation.relu(), caught.gradient, caught.score)
    assert relative(implementation(name)(overwritten)[:, 0], expected) < 1e-4
    if name == "gradcam":
        assert relative(implementation(name)(caught)[:, 0], expected) > 1e-2


def test_pytorch_grad_cam_overwrites_vgg_convolutions(nets, pictures):
    """The same at a VGG convolution, which an in-place ReLU follows."""
    net = nets["vgg11"]
    found = implementation("gradcam")(ours(net, "features.18", pictures))[:, 0]
    assert relative(found, theirs("gradcam", net, "features.18", pictures)) > 1e-3
    captum = LayerGradCam(net, net.features[18]).attribute(
        pictures, target=torch.tensor(TARGETS), relu_attributions=True
    )
    assert relative(found, captum[:, 0].detach()) < 1e-4


@pytest.mark.parametrize("net_name", ["resnet18", "tf_efficientnet_lite0"])
def test_plus_plus_of_pytorch_grad_cam_is_its_epsilon(net_name, nets, pictures):
    """It adds 1e-6 to a denominator of about 2 g^2, which is much for gradients near 1e-3.

    Our formula with that epsilon put in gives its map; without it, the paper's.
    """
    net, layer = nets[net_name], NETS[net_name]
    caught = ours(net, layer, pictures)
    expected = theirs("gradcam_plus_plus", net, layer, pictures)
    g, a = caught.gradient[:, 0].double(), caught.activation.double()
    with_epsilon = g**2 / (2 * g**2 + a.sum((2, 3), keepdim=True) * g**3 + 1e-6)
    weights = (torch.where(g != 0, with_epsilon, 0) * g.relu()).sum((2, 3))
    same = torch.einsum("nk,nkhw->nhw", weights, a).relu()
    assert relative(same, expected.double()) < 1e-4
    ours_map = implementation("gradcam_plus_plus")(caught)[:, 0]
    paper = g**2 / (2 * g**2 + a.sum((2, 3), keepdim=True) * g**3)
    weights = (torch.where(g != 0, paper, 0) * g.relu()).sum((2, 3))
    assert relative(ours_map.double(), torch.einsum("nk,nkhw->nhw", weights, a).relu()) < 1e-4


@pytest.mark.parametrize("net_name", NETS)
def test_captum_gradcam(net_name, nets, pictures):
    net, layer = nets[net_name], NETS[net_name]
    found = implementation("gradcam")(ours(net, layer, pictures))[:, 0]
    expected = LayerGradCam(net, net.get_submodule(layer)).attribute(
        pictures, target=torch.tensor(TARGETS), relu_attributions=True
    )
    assert relative(found, expected[:, 0].detach()) < 1e-4
