"""Records that several processes map are read whole or not at all, whenever a process exits."""

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
)
from tests.waiting import until


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
    """Cut a write off after each byte: the former record stays readable, the next write works."""
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
        until(lambda: reader.read() is not None)
        lengths = set()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
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


def test_a_status_names_the_jobs(tmp_path):
    written = WorkerStatusFile.create(tmp_path / "status")
    read = WorkerStatusFile.open(tmp_path / "status")
    assert read.read() is None
    jobs = tuple(RunningJob(id=f"{n:032x}", digest=f"{n:032x}", worker_exits=n) for n in range(256))
    status = WorkerStatus(
        ready=True, activity="batch", since=5.0, predicted_s=0.1, jobs=jobs, wait_ms=1.5
    )
    written.write(status)
    assert read.read() == status
    written.close()
    read.close()


def test_the_largest_states_fit_and_are_decoded_once(tmp_path):
    ids = tuple(f"{n:032x}" for n in range(256))
    exits = tuple(WorkerExit(incarnation=n, reason="SIGSEGV", suspects=ids) for n in range(8))
    states = DeviceStates(
        devices=tuple(DeviceState(device=f"cuda:{n}", exits=exits) for n in range(4)),
        quarantined=ids * 4,
    )
    written = DeviceStatesFile.create(tmp_path / "states")
    written.write(states)
    read = DeviceStatesFile.open(tmp_path / "states")
    assert read.read() == states
    assert read.read() is read.read(), "decoded again though nothing changed"
    written.close()
    read.close()


def test_a_state_is_read_after_a_write_that_was_under_way(tmp_path):
    """A reader that meets a half-written state still sees the whole one once it is written."""
    path = tmp_path / "states"
    written, read = DeviceStatesFile.create(path), DeviceStatesFile.open(path)
    written.write(DeviceStates())
    before = path.read_bytes()
    written.write(DeviceStates(draining=True))
    after = path.read_bytes()
    # The header is written first, then the record.
    half = len(before) // 2
    start = half if after[half:] != before[half:] else 0
    path.write_bytes(after[: start + 8] + before[start + 8 :])
    assert read.read() == DeviceStates()
    path.write_bytes(after)
    assert read.read() == DeviceStates(draining=True)
    written.close()
    read.close()
