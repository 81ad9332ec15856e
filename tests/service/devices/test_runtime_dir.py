"""The private folder of the service."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterator

import pytest
from fake_engine import spec

from service.devices.runtime_dir import RuntimeDir, holds


@pytest.fixture
def runtime(monkeypatch) -> Iterator[RuntimeDir]:
    with tempfile.TemporaryDirectory(prefix="h") as short:  # shorter than pytest's own folder
        monkeypatch.setattr("tempfile.tempdir", short)
        yield RuntimeDir.create()


def test_the_folder_is_private(runtime):
    assert stat.S_IMODE(runtime.path.stat().st_mode) == 0o700
    assert runtime.socket_url("cuda:0", 3) == f"ipc://{runtime.path}/worker-cuda-0-3"


def test_the_catalog_is_changed_as_a_whole(runtime):
    runtime.write_catalog([spec("a")])
    runtime.change_catalog(lambda specs: [*specs, spec("b", version="2")])
    assert [(s.name, s.version) for s in runtime.read_catalog()] == [("a", "1"), ("b", "2")]
    assert not [path for path in runtime.path.iterdir() if path.name.startswith("tmp")]


def test_a_path_too_long_for_a_socket_is_said_at_once(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(OSError, match="TMPDIR"):
        RuntimeDir.create()
    assert not list(deep.iterdir())


def test_a_model_may_name_devices_or_kinds():
    assert holds(spec(), "cuda:3")
    assert holds(spec(devices=["cpu"]), "cpu:1")
    assert holds(spec(devices=["cuda:0"]), "cuda:0")
    assert not holds(spec(devices=["cuda:0"]), "cuda:1")
