"""Start, stop and restart: the supervisor and its HTTP processes."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import httpx
import psutil
import pytest
from fake_engine import Fault, expected_class, image_of, spec
from running import report

from tests.waiting import until

pytestmark = pytest.mark.process


def post(url: str, pixels) -> httpx.Response:
    return httpx.post(url, content=pixels.tobytes(), timeout=30, trust_env=False)


def gone(pids: list[int]) -> bool:
    return not any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids
    )


def all_pids(service) -> list[int]:
    return [*service.pids("faulty_worker"), *service.pids("small_http")]


def test_sigterm_finishes_accepted_requests(start_service):
    service = start_service(workers={"hang_floor_s": 10})
    until(service.answers)
    pixels = image_of(1, Fault.HOLD)
    answers = []
    request = threading.Thread(target=lambda: answers.append(post(service.url(), pixels)))
    request.start()
    until(lambda: service.status().jobs)
    pids, folder = all_pids(service), service.runtime.path
    begun = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    until(lambda: refused(service.port))
    assert not answers, "new connections were refused only after the old request's end"
    service.release()
    request.join()
    assert answers[0].status_code == 200
    assert answers[0].text == str(expected_class(pixels))
    assert service.process.wait(10) == 0
    report(f"drained in {time.monotonic() - begun:.2f} s")
    assert gone(pids)
    assert not folder.exists()


def refused(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return False
    except ConnectionRefusedError:
        return True


def test_requests_longer_than_the_grace_period_end_with_a_typed_error(start_service):
    service = start_service(grace_s=0.7, workers={"hang_floor_s": 10})
    until(service.answers)
    answers = []
    request = threading.Thread(
        target=lambda: answers.append(post(service.url(), image_of(1, Fault.LONG, 255)))
    )
    slow = threading.Thread(
        target=lambda: answers.append(post(service.url(), image_of(2, Fault.SLOW, 150)))
    )
    request.start()
    until(lambda: service.status().queue_depth)
    slow.start()
    # Both have arrived.
    until(lambda: service.status().queue_depth == 2 or answers)
    begun = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(10) == 0
    assert time.monotonic() - begun < 3.5
    request.join()
    slow.join()
    assert {answer.text for answer in answers} <= {
        "draining",
        str(expected_class(image_of(2, Fault.SLOW, 150))),
    }
    assert "draining" in {answer.text for answer in answers}


def test_a_second_signal_stops_at_once(start_service):
    service = start_service(workers={"hang_floor_s": 10})
    until(service.answers)
    request = threading.Thread(target=ignore_errors, args=(service.url(), image_of(1, Fault.HOLD)))
    request.start()
    until(lambda: service.status().jobs)
    pids = all_pids(service)
    service.process.send_signal(signal.SIGINT)
    until(lambda: "stopping: accepted requests" in service.log)
    begun = time.monotonic()
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(5) == 1
    assert time.monotonic() - begun < 1
    assert gone(pids)
    request.join()


def ignore_errors(url: str, pixels) -> None:
    try:
        post(url, pixels)
    except httpx.TransportError:
        return


@pytest.mark.parametrize("busy", [False, True])
def test_every_child_exits_with_a_killed_supervisor(service, busy):
    until(service.answers)
    if busy:
        request = threading.Thread(
            target=ignore_errors, args=(service.url(), image_of(1, Fault.HANG))
        )
        request.start()
        until(lambda: service.status().jobs)
    pids = all_pids(service)
    assert len(pids) == 2
    service.process.kill()
    service.process.wait()
    until(lambda: gone(pids), timeout_s=3)


def test_only_a_killed_http_process_is_replaced(start_service):
    service = start_service(http_workers=2)
    until(service.answers)
    worker = service.worker_pid()
    before = set(service.pids("small_http"))
    assert len(before) == 2
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    assert post(service.url(), image_of(1)).status_code == 200, "the other one serves"
    until(lambda: len(set(service.pids("small_http")) - {victim}) == 2)
    until(
        lambda: (
            {int(httpx.get(service.url("/pid"), trust_env=False).text) for _ in range(20)} - before
        )
    )
    assert service.worker_pid() == worker
    assert service.states.devices[0].restarts == 0


def test_http_processes_do_not_import_torch(service):
    until(service.answers)
    assert httpx.get(service.url("/torch"), trust_env=False).text == "False"


def test_readiness_falls_when_the_service_drains(service):
    until(service.answers)
    request = threading.Thread(target=ignore_errors, args=(service.url(), image_of(1, Fault.HOLD)))
    request.start()
    until(lambda: service.status().jobs)
    with httpx.Client(trust_env=False) as client:
        assert client.get(service.url("/ready")).status_code == 200
        # Its own drain is held, to observe it.
        os.kill(service.pids("small_http")[0], signal.SIGSTOP)
        service.process.send_signal(signal.SIGTERM)
        until(lambda: service.states.draining, timeout_s=1)
        os.kill(service.pids("small_http")[0], signal.SIGCONT)
    service.release()
    request.join()


def test_a_worker_that_never_starts_spends_the_budget(start_service):
    service = start_service(workers={"restarts": 1}, models=[spec(kind="crash")])
    assert service.process.wait(20) == 1
    assert "restart budget" in service.log


def test_a_model_that_crashes_while_loading_is_left_out(start_service):
    service = start_service(
        models=[spec(), spec("bad", kind="crash"), spec("broken", kind="broken")]
    )
    until(lambda: service.states.refused_models)
    until(service.answers)
    assert service.states.refused_models == ("bad@1",)
    assert service.status().models == ("fake@1",)
    assert post(service.url(), image_of(3)).text == str(expected_class(image_of(3)))


def test_a_taken_port_is_an_error(service, start_service):
    second = start_service(port=service.port)
    assert second.process.wait(10) == 1
    assert "cannot listen" in second.log
