"""Which files the command line takes, and what it calls their results."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.cli.files import find_images, slug


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def test_a_folder_stands_for_its_pictures(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.png", "deep/c.webp", "notes.txt", "d.jpg/e.gif")
    names = [picture.path.relative_to(tmp_path).as_posix() for picture in find_images([tmp_path])]
    assert names == ["a.png", "b.JPG", "d.jpg/e.gif", "deep/c.webp"]


def test_a_file_is_taken_whatever_it_is_called(tmp_path: Path) -> None:
    (odd,) = touch(tmp_path, "picture.dat")
    missing = tmp_path / "missing.jpg"
    assert [picture.path for picture in find_images([odd, missing])] == [odd, missing]


def test_a_file_named_twice_is_taken_once(tmp_path: Path) -> None:
    (file,) = touch(tmp_path, "cat.jpg")
    assert len(find_images([file, tmp_path, tmp_path / "." / "cat.jpg"])) == 1


def test_results_do_not_overwrite_each_other(tmp_path: Path) -> None:
    files = touch(tmp_path, "cat.jpg", "cat.png", "x/cat.jpg", "y/Cat.jpg", "z/cat.jpg")
    names = [picture.name for picture in find_images(files)]
    assert names == ["cat", "cat.png", "cat.jpg", "Cat-2", "cat-3"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Egyptian cat", "Egyptian_cat"),
        ("../../etc/passwd", "etc_passwd"),
        ("layer4.1", "layer4.1"),
        ("école", "école"),
        ("...", "_"),
    ],
)
def test_slugs(text: str, expected: str) -> None:
    assert slug(text) == expected
