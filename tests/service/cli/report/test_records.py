"""Records survive an interruption, and are dropped when they were made otherwise."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import heatlens
from service.cli.report.dataset import LabelledImage
from service.cli.report.records import Record, RecordFile, collect

SETTING = {"model": "tiny@1", "methods": ["gradcam"]}


def test_records_are_read_again(tmp_path):
    path = tmp_path / "r.jsonl"
    first = RecordFile(path, SETTING)
    first.add(Record(path="a", class_id=1, predicted=1, values=[[0.5]]))
    first.add(Record(path="b", class_id=1, error="unreadable"))
    again = RecordFile(path, SETTING)
    assert again.records == {"a": first.records["a"]}, "a failed image is tried again"


def test_a_line_cut_by_an_interruption_is_passed_over(tmp_path):
    path = tmp_path / "r.jsonl"
    file = RecordFile(path, SETTING)
    file.add(Record(path="a", class_id=1))
    with path.open("a") as stream:
        stream.write('{"path": "b", "cla')
    again = RecordFile(path, SETTING)
    assert set(again.records) == {"a"}
    again.add(Record(path="c", class_id=1))
    assert set(RecordFile(path, SETTING).records) == {"a", "c"}


def test_another_setting_begins_anew(tmp_path):
    path = tmp_path / "r.jsonl"
    RecordFile(path, SETTING).add(Record(path="a", class_id=1))
    assert RecordFile(path, {**SETTING, "methods": ["layercam"]}).records == {}


class FakeClient:
    """Explains images named by a number, and counts; `b"bad"` cannot be decoded."""

    def __init__(self) -> None:
        self.explained: list[int] = []

    async def explain(self, data: bytes, **options: object) -> SimpleNamespace:
        if data == b"bad":
            raise heatlens.APIError("No image.", code="image_undecodable", status=422)
        number = int(data)
        self.explained.append(number)
        maps = [
            SimpleNamespace(
                target=SimpleNamespace(class_id=class_id, probability=0.5),
                values=np.full((2, 2), number),
                faithfulness={},
            )
            for class_id in (number % 2, 0)
        ]
        region = SimpleNamespace(x=0, y=0, width=8, height=8)
        image = SimpleNamespace(width=8, height=8, region=region)
        return SimpleNamespace(explanations=maps, result=SimpleNamespace(image=image))


def images_of(folder: Path) -> list[LabelledImage]:
    return [LabelledImage(path=path, class_id=0) for path in sorted(folder.glob("*.jpg"))]


async def collected(client: FakeClient, folder: Path, *, stop_after: int | None = None) -> int:
    """Explain the images of a folder until so many are done; returns their number."""
    file = RecordFile(folder / "r.jsonl", SETTING)
    work = collect(client, images_of(folder), file, folder=folder, options={}, measured=0)
    done = 0
    async with aclosing(work):
        async for _ in work:
            done += 1
            if done == stop_after:
                break
    return done


@pytest.mark.anyio
async def test_an_interrupted_collection_goes_on_without_loss(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.jpg").write_text(str(number))
    (tmp_path / "05.jpg").write_bytes(b"bad")
    client = FakeClient()
    await collected(client, tmp_path, stop_after=20)
    kept = RecordFile(tmp_path / "r.jsonl", SETTING).records
    assert len(kept) >= 19
    done = await collected(client, tmp_path)
    assert done == 40 - len(kept), "only what is missing is explained"
    again = RecordFile(tmp_path / "r.jsonl", SETTING).records
    assert {name: again[name] for name in kept} == kept
    assert set(again) == {f"{n:02}.jpg" for n in range(40) if n != 5}
    assert [again[f"{n:02}.jpg"].values[0][0] for n in range(40) if n != 5] == [
        n for n in range(40) if n != 5
    ]
    # The bad image is tried again, nothing else.
    assert await collected(client, tmp_path) == 1
