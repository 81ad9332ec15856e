"""Networks that torch.export saved keep their layers, and take any batch."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.errors import ModelLoadFailed
from models.sources import load
from models.warmup import warm_up

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, images):
        maps = self.pool(self.features(images))
        return self.fc(maps.view(maps.shape[0], -1))


class BoundToItsBatch(Net):
    def forward(self, images):
        return super().forward(images) * torch.arange(1.0, images.shape[0] + 1)[:, None]


def exported(path, network, *, batch: int = 2, free: bool = True) -> nn.Module:
    torch.manual_seed(0)
    network = network.eval()
    images = torch.randn(batch, 3, 32, 40)
    shapes = ({0: torch.export.Dim("batch")},) if free else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(network, (images,), dynamic_shapes=shapes), path)
    return network


@pytest.mark.parametrize(("batch", "free"), [(2, True), (1, False), (4, False)])
def test_scores_and_layers_are_those_of_the_network(tmp_path, spec_of, batch, free):
    plain = exported(tmp_path / "net.pt2", Net(), batch=batch, free=free)
    loaded = load(spec_of("export:net.pt2"), tmp_path)
    images = torch.randn(5, 3, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), plain(images))
    ours, theirs = dict(loaded.module.named_modules()), dict(plain.named_modules())
    for name in ("features.0", "features.1", "features.2", "features.3", "pool", "fc"):
        assert type(ours[name]) is type(theirs[name])
    assert loaded.preprocess.crop == (32, 40)
    assert any("made to take others" in note for note in loaded.notes) is not free


def test_gradients_reach_the_layers(tmp_path, spec_of):
    plain = exported(tmp_path / "net.pt2", Net()).requires_grad_(False)
    loaded = load(spec_of("export:net.pt2"), tmp_path)
    own = replace(loaded, module=plain)
    card, expected = (warm_up(m, CPU, warmup_s=0.0).info.card for m in (loaded, own))
    for fact in ("target_layer", "head", "closed_form"):
        assert getattr(card, fact) == getattr(expected, fact)
    applicable = {row.name for row in card.methods if row.applicable}
    assert {"gradcam", "scorecam", "saliency", "guided_backprop"} <= applicable


def test_a_network_that_is_held_to_its_batch_is_refused(tmp_path, spec_of):
    exported(tmp_path / "net.pt2", BoundToItsBatch(), batch=2, free=False)
    with pytest.raises(ModelLoadFailed, match=r"batches of 2 alone.*dynamic_shapes"):
        load(spec_of("export:net.pt2"), tmp_path)


def test_files_that_are_no_export(tmp_path, spec_of):
    with pytest.raises(ModelLoadFailed, match="does not exist"):
        load(spec_of("export:net.pt2"), tmp_path)
    (tmp_path / "net.pt2").write_bytes(b"PK")
    with pytest.raises(ModelLoadFailed, match=r"not written by torch\.export\.save"):
        load(spec_of("export:net.pt2"), tmp_path)
