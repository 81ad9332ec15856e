"""Class names from lists and files."""

from __future__ import annotations

import json

import pytest

from models.catalog import ModelSpec
from models.errors import ModelLoadFailed
from models.labels import default_labels, read_labels


def spec(labels) -> ModelSpec:
    return ModelSpec(name="m", source="torchvision:resnet18", labels=labels)


def test_none_configured(tmp_path):
    assert read_labels(spec(None), tmp_path) is None


def test_a_list(tmp_path):
    assert read_labels(spec(["a", "b"]), tmp_path) == ("a", "b")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "tench\ngold fish\ncôte\n"),
        ("l.txt", "\ufefftench\r\ngold fish\r\ncôte\r\n\r\n"),
        ("l.json", '["tench", "gold fish", "côte"]'),
        ("l.json", '{"2": "côte", "0": "tench", "1": "gold fish"}'),
    ],
)
def test_files(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_labels(spec(name), tmp_path) == ("tench", "gold fish", "côte")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", b"", "empty"),
        ("l.txt", b"a\n\nb\n", "empty"),
        ("l.txt", b"\xff\xfe\x00", "UTF-8"),
        ("l.json", b'{"0": "a", "2": "c"}', "without gaps"),
        ("l.json", b'{"zero": "a"}', "without gaps"),
        ("l.json", b'["a", 3]', "list of names"),
        ("l.json", b"[" * 100_000, "list of names"),
        ("l.json", b"[]", "empty"),
        ("l.json", b'"abc"', "list of names"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadFailed, match=message):
        read_labels(spec(name), tmp_path)


def test_a_missing_file_is_named_as_configured(tmp_path):
    with pytest.raises(ModelLoadFailed, match=r"labels file names/l\.txt does not exist") as caught:
        read_labels(spec("names/l.txt"), tmp_path)
    assert str(tmp_path) not in caught.value.message


def test_an_index_may_be_an_integer_key_after_json(tmp_path):
    (tmp_path / "l.json").write_text(json.dumps({0: "a", 1: "b"}))
    assert read_labels(spec("l.json"), tmp_path) == ("a", "b")


def test_default_labels():
    assert default_labels(2) == ("class 0", "class 1")
