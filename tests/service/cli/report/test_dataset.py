"""Which image has which class, and what is said if that cannot be known."""

import pytest
from PIL import Image

from service.cli.report.dataset import DatasetError, read_dataset

LABELS = ["tabby", "Egyptian cat", "tabby"]


@pytest.fixture
def folder(tmp_path):
    for name in ("tabby/a.png", "Egyptian_cat/b.png"):
        path = tmp_path / name
        path.parent.mkdir()
        Image.new("RGB", (8, 8)).save(path)
    return tmp_path


def table(folder, text):
    path = folder / "labels.csv"
    path.write_text(text)
    return path


def test_folders_are_classes(folder):
    found = {image.path.name: image.class_id for image in read_dataset(folder, None, LABELS)}
    assert found == {"a.png": 0, "b.png": 1}


def test_folders_may_be_indices(folder):
    (folder / "tabby").rename(folder / "2")
    found = {image.path.name: image.class_id for image in read_dataset(folder, None, LABELS)}
    assert found["a.png"] == 2


def test_a_table_gives_classes_and_boxes(folder):
    table(folder, "file,label,x,y,width,height\ntabby/a.png,egyptian cat,1,2,3,4\n")
    (image,) = read_dataset(folder, None, LABELS)
    assert image.class_id == 1
    assert image.box == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("file,label\ntabby/a.png,zebra\n", r"labels\.csv:2.*'zebra'.*Egyptian"),
        ("file,label\nabsent.png,tabby\n", r"labels\.csv:2.*absent\.png"),
        ("name,class_name\na,b\n", "columns file and label.*name, class_name"),
        ("file,label,x,y,width,height\ntabby/a.png,0,1,2,,4\n", r"labels\.csv:2.*four numbers"),
        ("file,label\n", "no labelled images"),
    ],
)
def test_a_wrong_table_says_what_to_change(folder, text, hint):
    table(folder, text)
    with pytest.raises(DatasetError, match=f"(?i){hint}"):
        read_dataset(folder, None, LABELS)


def test_an_unknown_folder_is_named(folder):
    (folder / "tabby").rename(folder / "zebra")
    with pytest.raises(DatasetError, match="zebra"):
        read_dataset(folder, None, LABELS)


def test_an_image_without_a_folder_is_named(folder):
    Image.new("RGB", (8, 8)).save(folder / "stray.png")
    with pytest.raises(DatasetError, match=r"stray\.png"):
        read_dataset(folder, None, LABELS)
