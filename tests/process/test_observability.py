"""Observability of a real service: traces across processes, request ids in logs, metrics."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import httpx
import pytest
import yaml
from collector import Collector
from configured import BASE
from fake_engine import Fault, image_of
from traffic import png

from tests.recording_rules import recorded
from tests.waiting import until

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("decode", "queue", "batch", "device", "render")
INBOUND = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
NAME = re.compile(r"\b(?:heatlens|http|request|process|up)_[a-z_]+\b")


def ask(running, pixels, **headers: str) -> httpx.Response:
    return httpx.post(
        running.service.url("/v1/predict"),
        content=png(pixels),
        headers={"X-API-Key": "one", **headers},
        timeout=30,
        trust_env=False,
    )


# ---------------------------------------------------------------- traces and logs


def test_one_trace_crosses_the_processes(configured):
    with Collector() as collector:
        running = configured(tracing={"endpoint": collector.endpoint})
        answer = ask(running, image_of(1), traceparent=INBOUND, **{"X-Request-ID": "seen-1"})
        assert answer.status_code == 200
        version, trace, span, flags = answer.headers["traceparent"].split("-")
        assert (version, trace, flags) == ("00", INBOUND.split("-")[1], "01")
        own = ask(running, image_of(2)).headers["traceparent"].split("-")[1]
        assert own != trace
        unsampled = INBOUND.replace("4bf9", "5bf9").removesuffix("01") + "00"
        assert (
            ask(running, image_of(3), traceparent=unsampled).headers["traceparent"].endswith("00")
        )
        assert ask(running, image_of(4, Fault.RAISE)).status_code == 500
        # The remaining spans are sent.
        running.service.stop()

    spans = collector.of(trace)
    request = spans.pop("POST /v1/predict")
    assert request.id == span
    assert request.parent == INBOUND.split("-")[2]
    assert request.attributes["http.route"] == "/v1/predict"
    assert request.attributes["http.response.status_code"] == 200
    assert set(spans) == set(STAGES)
    assert {spans[name].parent for name in ("decode", "queue", "batch", "render")} == {request.id}
    assert spans["device"].parent == spans["batch"].id
    assert {name for name in STAGES if spans[name].process == "worker"} == {
        "queue",
        "batch",
        "device",
    }
    moments = [spans["decode"].began, *(spans[name].ended for name in ("decode", "queue"))]
    moments += [spans["device"].ended, spans["render"].began, spans["render"].ended, request.ended]
    assert moments == sorted(moments), "clocks of two processes disagree"
    assert request.began <= moments[0]
    assert spans["batch"].attributes["heatlens.batch.reason"] == "idle"
    assert spans["batch"].attributes["heatlens.model"] == "fake@1"
    assert spans["device"].attributes["heatlens.device"] == "cpu"
    assert set(collector.of(own)) == {"POST /v1/predict", *STAGES}
    assert not collector.of(unsampled.split("-")[1])
    names = {span.name for span in collector.spans}
    assert "GET /readyz" not in names, "probes have no trace"


def test_log_lines_of_a_job_carry_its_request_in_every_process(configured):
    running = configured(server={**BASE["server"], "http_workers": 1})
    assert ask(running, image_of(1, Fault.RAISE), **{"X-Request-ID": "raises"}).status_code == 500
    assert ask(running, image_of(2, Fault.KILL), **{"X-Request-ID": "kills"}).status_code == 500
    running.service.stop()
    lines = [json.loads(line) for line in running.service.log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    by_logger = {line["logger"] for line in lines if line.get("request_id") == "raises"}
    assert by_logger == {"heatlens.compute", "heatlens.access"}
    access = [line for line in lines if line.get("request_id") == "kills"]
    assert [line["code"] for line in access] == ["input_quarantined"]
    exits = [line for line in lines if "exited: SIGKILL" in line["message"]]
    assert [line["request_ids"] for line in exits] == [["kills"], ["kills"]]


# ---------------------------------------------------------------- metrics


def expressions() -> Iterable[str]:
    """Every query in the dashboard, the alerts and the recording rules."""
    dashboard = json.loads((ROOT / "deploy/grafana/heatlens.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    yield from (
        variable["query"]["query"] if isinstance(variable["query"], dict) else variable["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    )
    for name in ("alerts.yml", "triton.yml"):
        rules = yaml.safe_load((ROOT / "deploy/prometheus" / name).read_text())
        yield from (rule["expr"] for group in rules["groups"] for rule in group["rules"])


def metrics(text: str) -> dict[str, float]:
    """Samples by name and labels."""
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_every_metric_that_is_used_is_there_and_adds_up(configured):
    running = configured(limits={"max_images": 2})
    # Each has its own connection, so that both HTTP processes get some.
    for number in range(20):
        assert ask(running, image_of(number)).status_code == 200
    assert ask(running, image_of(1, Fault.RAISE)).status_code == 500
    assert ask(running, image_of(2, Fault.KILL_ONCE)).status_code == 200
    until(running.is_ready)
    scrapes = [httpx.get(running.service.url("/metrics"), trust_env=False).text for _ in range(6)]
    found = metrics(scrapes[-1])
    names = {name.partition("{")[0] for name in found}
    used = {name for expression in expressions() for name in NAME.findall(expression)}
    assert len(used) > 12
    assert not used - names, f"no such metrics: {sorted(used - names)}"
    ours = "request_duration_seconds_count", "queue_depth", "inflight", "batch_size_count"
    ours += "rejected_total", "cancelled_total", "device_up", "worker_restarts_total"
    ours += "device_memory_bytes", "stage_duration_seconds_count", "batches_total"
    kserve = {f"request_{name}_seconds_count" for name in ("preprocess", "postprocess", "predict")}
    assert {f"heatlens_{name}" for name in ours} | kserve <= names

    served = 'model="fake",operation="predict",version="1"}'
    ok = f'heatlens_request_duration_seconds_count{{code="ok",{served}'
    counts = {metrics(text)[ok] for text in scrapes}
    assert counts == {21.0}, "a scrape of one process tells only of some"
    assert found['heatlens_rejected_total{reason="internal"}'] == 1
    assert found['heatlens_worker_restarts_total{device="cpu",reason="crash"}'] == 1
    assert found['heatlens_device_memory_bytes{device="cpu"}'] > 1e7
    assert found['heatlens_device_up{device="cpu"}'] == 1
    assert found['heatlens_model_ready{model="fake",version="1"}'] == 1
    alone = 'heatlens_batches_total{device="cpu",model="fake",reason="alone",version="1"}'
    assert found[alone] == 1, "the job that was part of an exit ran alone"
    as_triton = recorded(scrapes[-1])
    model = frozenset({("model", "fake"), ("version", "1")})
    assert as_triton["nv_inference_request_success"][model] == 21
    failed = as_triton["nv_inference_request_failure"]
    assert failed == {model | {("reason", "BACKEND")}: 1}
    assert as_triton["nv_inference_count"][model] == 21
    assert as_triton["nv_inference_compute_infer_duration_us"][model] > 21 * 2000
    routes = {name for name in found if name.startswith("http_request_duration_seconds_count")}
    assert any('route="/v1/predict"' in name for name in routes)


# ---------------------------------------------------------------- the end


def test_sigterm_with_real_requests(configured):
    """Readiness ends at once, connections are closed by a response, accepted requests finish."""

    server = {**BASE["server"], "http_workers": 1}
    running = configured(server=server)
    answers = []
    slow = threading.Thread(target=lambda: answers.append(ask(running, image_of(1, Fault.HOLD))))
    with httpx.Client(trust_env=False, base_url=running.service.url("")) as kept:
        assert kept.get("/readyz").status_code == 200
        slow.start()
        until(lambda: running.service.status().jobs)
        (pid,) = running.http_pids()
        running.service.process.send_signal(signal.SIGTERM)
        until(lambda: running.service.states.draining, timeout_s=1)
        # HTTP processes poll every 20 ms; the connection ends with its first response from then on.
        time.sleep(0.1)
        answer = kept.get("/readyz")
        assert answer.status_code == 503
        assert "device cpu: draining" in answer.json()["missing"]
        assert answer.headers["connection"] == "close"
        with pytest.raises(httpx.TransportError):
            kept.get("/readyz")
        assert Path(f"/proc/{pid}").exists()
    running.service.release()
    slow.join()
    assert answers[0].status_code == 200
    assert running.service.process.wait(10) == 0
