"""ONNX graphs give the scores of ONNX Runtime, and maps of their last map."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from models.errors import ModelLoadFailed
from models.sources import load
from models.warmup import warm_up

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, maps):
        return (maps + self.conv(maps)).relu()


class Net(nn.Module):
    def __init__(self, end: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)
        self.end = end or nn.Identity()

    def forward(self, images):
        maps = self.pool(self.blocks(self.stem(images)))
        return self.end(self.fc(maps.view(maps.shape[0], -1)))


class Flat(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8 * 64, 4)
        self.pool = nn.Identity()


def exported(path, network: nn.Module, *, free: bool = True) -> nn.Module:
    torch.manual_seed(0)
    network = network.eval()
    axes = {"images": {0: "batch"}} if free else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.randn(2 if free else 1, 3, 32, 32),),
            path,
            input_names=["images"],
            dynamic_axes=axes,
            dynamo=False,
        )
    return network


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("network", [Net, Flat])
def test_scores_are_those_of_onnx_runtime(tmp_path, spec_of, network, free):
    exported(tmp_path / "net.onnx", network(), free=free)
    loaded = load(spec_of("onnx:net.onnx"), tmp_path)
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 32, 32)
    expected = [session.run(None, {"images": image[None].numpy()})[0][0] for image in images]
    with torch.no_grad():
        found = loaded.module(images)
    torch.testing.assert_close(found, torch.tensor(np.array(expected)), atol=1e-4, rtol=0)


def test_the_last_map_has_gradients_in_closed_form(tmp_path, spec_of):
    plain = exported(tmp_path / "net.onnx", Net())
    loaded = load(spec_of("onnx:net.onnx"), tmp_path)
    card = warm_up(loaded, torch.device("cpu"), warmup_s=0.0).info.card
    assert (card.target_layer, card.head, card.closed_form) == (
        "blocks_blocks_1_Relu",
        "gap_linear",
        True,
    )
    support = {row.name: row for row in card.methods}
    for name in ("cam", "gradcam", "hirescam", "eigencam", "scorecam", "occlusion", "rise"):
        assert support[name].applicable, support[name].reason
    for name in ("saliency", "integrated_gradients", "lrp", "fullgrad"):
        assert not support[name].applicable
        assert support[name].reason
    maps = plain.blocks(plain.stem(images := torch.randn(2, 3, 32, 32)))
    layer = loaded.module.get_submodule(card.target_layer)
    kept = []
    handle = layer.register_forward_hook(lambda _m, _a, output: kept.append(output))
    loaded.module(images)
    handle.remove()
    torch.testing.assert_close(kept[0], maps, atol=1e-5, rtol=1e-4)


def test_a_graph_without_pooling_is_explained_without_gradients(tmp_path, spec_of):
    exported(tmp_path / "net.onnx", Flat())
    loaded = load(spec_of("onnx:net.onnx"), tmp_path)
    card = warm_up(loaded, torch.device("cpu"), warmup_s=0.0).info.card
    applicable = {row.name for row in card.methods if row.applicable}
    assert {"occlusion", "rise"} <= applicable
    assert "gradcam" not in applicable


def test_a_softmax_at_the_end_is_left_out(tmp_path, spec_of):
    exported(tmp_path / "net.onnx", Net(nn.Softmax(dim=1)))
    notes = load(spec_of("onnx:net.onnx"), tmp_path).notes
    assert any("softmax at its end" in note for note in notes)


def test_files_that_are_no_graph_of_images(tmp_path, spec_of):
    with pytest.raises(ModelLoadFailed, match="does not exist"):
        load(spec_of("onnx:net.onnx"), tmp_path)
    (tmp_path / "net.onnx").write_bytes(b"\x00")
    with pytest.raises(ModelLoadFailed, match="cannot be read as an ONNX graph"):
        load(spec_of("onnx:net.onnx"), tmp_path)
