"""Records that several processes map: whole or not at all, whoever dies when."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from service.devices.shared_record import SharedRecord
from service.devices.status import (
    DeviceState,
    DeviceStates,
    DeviceStatesFile,
    RunningJob,
    WorkerExit,
    WorkerStatus,
    WorkerStatusFile,
    is_hung,
)


def test_what_is_written_is_read_elsewhere(tmp_path):
    writer = SharedRecord.create(tmp_path / "record", capacity=100)
    reader = SharedRecord(tmp_path / "record")
    assert reader.read() is None
    for record in (b"one", b"", b"x" * 100, b"two"):
        writer.write(record)
        assert reader.read() == record
    with pytest.raises(ValueError, match="101"):
        writer.write(bytes(101))
    assert reader.read() == b"two"
    assert (tmp_path / "record").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        SharedRecord.create(tmp_path / "record", capacity=100)
    writer.close()
    reader.close()


def test_a_half_written_record_is_passed_over(tmp_path):
    """Cut a write off after each byte: the former record stays readable, and the next write works."""
    path = tmp_path / "record"
    SharedRecord.create(path, capacity=50).write(b"first")
    record = SharedRecord(path)
    record.write(b"former")
    before = path.read_bytes()
    record.write(b"newest, and rather longer")
    after = path.read_bytes()
    changed = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    for cut in range(len(changed)):
        torn = bytearray(before)
        for i in changed[:cut]:
            torn[i] = after[i]
        path.write_bytes(torn)
        reader = SharedRecord(path)
        assert reader.read() == b"former", cut
        reader.write(b"next")
        assert SharedRecord(path).read() == b"next"
    path.write_bytes(after)
    assert SharedRecord(path).read() == b"newest, and rather longer"


def _write_for_ever(path) -> None:
    record = SharedRecord(path)
    number = 0
    while True:
        number += 1
        record.write(bytes([number % 256]) * (number % 5000))


@pytest.mark.process
def test_no_reader_sees_half_a_record_while_another_process_writes(tmp_path):
    path = tmp_path / "record"
    reader = SharedRecord.create(path, capacity=5000)
    writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(path,))
    writer.start()
    try:
        while reader.read() is None:
            time.sleep(0.01)
        lengths = set()
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            record = reader.read()
            assert record is not None
            assert len(set(record)) <= 1
            lengths.add(len(record))
        assert len(lengths) > 10
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert reader.read() is not None
    finally:
        writer.kill()
        writer.join()


def test_the_board_names_the_jobs(tmp_path):
    written = WorkerStatusFile.create(tmp_path / "board")
    read = WorkerStatusFile.open(tmp_path / "board")
    assert read.read() is None
    jobs = tuple(RunningJob(id=f"{n:032x}", digest=f"{n:032x}", worker_exits=n) for n in range(256))
    board = WorkerStatus(
        ready=True, activity="batch", since=5.0, predicted_s=0.1, jobs=jobs, wait_ms=1.5
    )
    written.write(board)
    assert read.read() == board
    written.close()
    read.close()


@pytest.mark.parametrize(
    ("activity", "age_s", "predicted_s", "hung"),
    [
        ("idle", 1e6, 0.0, False),
        ("batch", 9.9, 0.01, False),  # the floor
        ("batch", 10.1, 0.01, True),
        ("batch", 49.0, 5.0, False),  # ten times the prediction
        ("batch", 51.0, 5.0, True),
        ("canary", 10.1, 0.01, True),
        ("load", 299.0, 0.0, False),
        ("load", 301.0, 0.0, True),
    ],
)
def test_hangs(activity, age_s, predicted_s, hung):
    board = WorkerStatus(activity=activity, since=1000.0, predicted_s=predicted_s)
    assert hung == is_hung(board, now=1000 + age_s, floor_s=10, factor=10, load_timeout_s=300)


def test_the_fleet_at_its_largest_fits(tmp_path):
    ids = tuple(f"{n:032x}" for n in range(256))
    exits = tuple(WorkerExit(incarnation=n, reason="SIGSEGV", suspects=ids) for n in range(8))
    fleet = DeviceStates(
        devices=tuple(DeviceState(device=f"cuda:{n}", exits=exits) for n in range(4)),
        quarantined=ids * 4,
    )
    written = DeviceStatesFile.create(tmp_path / "fleet")
    written.write(fleet)
    read = DeviceStatesFile.open(tmp_path / "fleet")
    assert read.read() == fleet
    assert read.read() is read.read(), "decoded again though nothing changed"
    written.close()
    read.close()
