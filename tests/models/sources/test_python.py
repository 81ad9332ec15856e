"""Factories of the user's own."""

from __future__ import annotations

import itertools
import sys

import pytest

from models.errors import ModelLoadFailed, cause_of
from models.sources import load

SOURCE = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def sized(num_classes=9):
    net = plain()
    net[3] = nn.Linear(4, num_classes)
    return net

def loose(**options):
    return sized(options["num_classes"])

def described():
    facts = {"preprocess": {"crop": 20, "resize": 24, "mean": [0, 0, 0]}, "labels": ["x", "y", "z"]}
    return plain(), facts

def raising():
    raise ValueError("the secret path /srv/models")

def wrong():
    return 3

def wrong_facts():
    return plain(), {"preprocess": {"size": 20}}

constant = 5
"""

numbers = itertools.count()


@pytest.fixture
def module_name(tmp_path, monkeypatch) -> str:
    """A module beside the configuration, under a name of its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"networks_of_test_{next(numbers)}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    return name


def test_a_factory_beside_the_configuration(module_name, spec_of, tmp_path):
    loaded = load(spec_of(f"python:{module_name}:plain", weights="default"), tmp_path)
    assert (loaded.num_classes, loaded.preprocess.crop) == (3, (224, 224))
    assert str(tmp_path) not in sys.path
    assert module_name not in sys.modules


@pytest.mark.parametrize(
    ("factory", "options", "classes"),
    [
        ("sized", {}, 9),
        ("sized", {"num_classes": 5}, 5),
        ("sized", {"labels": ["a", "b"]}, 2),
        ("loose", {"num_classes": 5}, 5),
        ("plain", {"num_classes": 3}, 3),
    ],
)
def test_the_number_of_classes_is_passed_on(
    module_name, spec_of, tmp_path, factory, options, classes
):
    for weights in ("default", "none"):
        entry = spec_of(f"python:{module_name}:{factory}", weights=weights, **options)
        assert load(entry, tmp_path).num_classes == classes


def test_facts_beside_the_network(module_name, spec_of, tmp_path):
    loaded = load(spec_of(f"python:{module_name}:described"), tmp_path)
    assert loaded.labels == ("x", "y", "z")
    assert (loaded.preprocess.crop, loaded.preprocess.resize) == ((20, 20), 24)
    assert loaded.preprocess.mean == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("raising", "raised an error"),
        ("wrong", "neither a torch.nn.Module nor"),
        ("wrong_facts", "preprocess that the factory .* may have mode, resize, crop"),
        ("constant", "no function constant"),
        ("absent", "no function absent"),
    ],
)
def test_what_goes_wrong_is_said_in_our_words(module_name, spec_of, tmp_path, factory, message):
    with pytest.raises(ModelLoadFailed, match=message) as caught:
        load(spec_of(f"python:{module_name}:{factory}"), tmp_path)
    assert "secret" not in caught.value.message


def test_fewer_classes_than_configured(module_name, spec_of, tmp_path):
    with pytest.raises(ModelLoadFailed, match="3 classes, but num_classes is 8"):
        load(spec_of(f"python:{module_name}:plain", num_classes=8), tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("python:not_there_at_all:make", "module not_there_at_all is not found, neither installed"),
        ("python:no_factory", "written python:package.module:factory"),
        ("python::make", "written python:package.module:factory"),
    ],
)
def test_sources_that_name_nothing(module_name, spec_of, tmp_path, source, message):
    with pytest.raises(ModelLoadFailed, match=message):
        load(spec_of(source), tmp_path)


def test_an_import_of_the_module_that_is_missing_is_told_from_the_module(
    module_name, spec_of, tmp_path
):
    (tmp_path / f"needs_{module_name}.py").write_text("import not_there_at_all")
    with pytest.raises(ModelLoadFailed, match=f"module that needs_{module_name} imports") as caught:
        load(spec_of(f"python:needs_{module_name}:make"), tmp_path)
    assert cause_of(caught.value) == (
        f"ModuleNotFoundError: No module named 'not_there_at_all' (needs_{module_name}.py:1)"
    )


def test_what_a_factory_raised_is_kept_for_the_operator(module_name, spec_of, tmp_path):
    with pytest.raises(ModelLoadFailed) as caught:
        load(spec_of(f"python:{module_name}:raising"), tmp_path)
    assert cause_of(caught.value) == (
        f"ValueError: the secret path /srv/models ({module_name}.py:21)"
    )


def test_a_module_that_does_not_import(module_name, spec_of, tmp_path):
    (tmp_path / f"broken_{module_name}.py").write_text("raise RuntimeError('secret')")
    with pytest.raises(ModelLoadFailed, match=r"Importing the module .* raised an error"):
        load(spec_of(f"python:broken_{module_name}:make"), tmp_path)


def test_a_factory_in_a_file(spec_of, tmp_path):
    folder = tmp_path / "my code"
    folder.mkdir()
    (folder / "layers.py").write_text("WIDTH = 3")
    (folder / "net.py").write_text(
        "from torch import nn\n"
        "from layers import WIDTH\n"
        "def build(): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, WIDTH))"
    )
    assert load(spec_of("python:my code/net.py:build"), tmp_path).num_classes == 3
    with pytest.raises(ModelLoadFailed, match=r"The module my code/other\.py is not found"):
        load(spec_of("python:my code/other.py:build"), tmp_path)
