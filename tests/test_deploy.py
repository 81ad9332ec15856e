"""Files for those who watch the service: complete, and in agreement with each other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from compose_spec import PyCompose

from models.errors import ERRORS
from service.api.metrics import Metrics, Served
from service.devices.pool import DeviceStatus
from service.devices.status import BatchCount
from tests.fakes import FakePool
from tests.recording_rules import RULES, evaluate, recorded, samples_of

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
BOARD = json.loads((ROOT / "deploy/grafana/heatlens.json").read_text())
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
SCRAPE = yaml.safe_load((ROOT / "deploy/prometheus/scrape.yml").read_text())


def balanced(expression: str) -> bool:
    depth = 0
    for character in re.sub(r'"[^"]*"', "", expression):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def test_compose_takes_the_file() -> None:
    # Variables are put in before the file is parsed.
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "docker-compose.yml").read_text())
    compose = PyCompose.from_yaml(text)
    for validate in (compose.validate, compose.validate_configs, compose.validate_networks):
        validate()
    assert set(compose.service_names()) == set(COMPOSE["services"])


def test_the_gpu_is_a_profile_of_its_own() -> None:
    service = COMPOSE["services"]["heatlens-gpu"]
    assert service["profiles"] == ["gpu"]
    assert service["extends"] == {"service": "heatlens"}
    (gpus,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert gpus["capabilities"] == ["gpu"]
    # Prometheus scrapes whichever of the two runs.
    (target,) = SCRAPE["scrape_configs"][0]["static_configs"][0]["targets"]
    assert service["networks"]["default"]["aliases"] == [target.partition(":")[0]]


def test_monitoring_is_optional_and_open_to_this_machine_only() -> None:
    assert "profiles" not in COMPOSE["services"]["heatlens"]
    for name in ("prometheus", "grafana"):
        service = COMPOSE["services"][name]
        assert service["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert ":" in service["image"], "which version is not said"
        for volume in service["volumes"]:
            source, _, rest = volume.partition(":")
            assert (ROOT / source).is_dir()
            assert rest.endswith(":ro")
        for config in service.get("configs", []):
            yaml.safe_load(COMPOSE["configs"][config["source"]]["content"])


def test_prometheus_finds_service_and_rules() -> None:
    (job,) = SCRAPE["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in COMPOSE["services"]
    assert COMPOSE["services"][host]["ports"][0].endswith(f":{port}")
    assert f"EXPOSE {port}\n" in (ROOT / "Dockerfile").read_text()
    for name in SCRAPE["rule_files"]:
        assert (ROOT / "deploy/prometheus" / name).is_file()
    command = COMPOSE["services"]["prometheus"]["command"][0]
    assert (ROOT / "deploy/prometheus" / Path(command.partition("=")[2]).name).is_file()


def test_every_alert_says_what_to_do() -> None:
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    for rule in rules:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"].keys() == {"summary", "action"}
        assert balanced(rule["expr"])


def test_every_panel_says_what_it_shows() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert balanced(target["expr"])
            assert 'job=~"$job"' in target["expr"]


# ---------------------------------------------------------------- Triton's names

BATCHES = (
    BatchCount(model="m", version="1", reason="full", batches=3, images=9),
    BatchCount(model="m", version="1", reason="idle", batches=2, images=2),
)
STAGES = {"decode": 0.001, "queue": 0.002, "device": 0.004, "render": 0.008}


class BusyPool(FakePool):
    def devices(self) -> list[DeviceStatus]:
        return [
            DeviceStatus(device=f"cpu:{index}", state="ready", batches=BATCHES) for index in (0, 1)
        ]


@pytest.fixture
def exposition() -> str:
    """Two requests of each kind that succeed, one of each error, and five images."""
    metrics = Metrics(BusyPool())
    for operation in ("predict", "explain"):
        served = Served(model="m", version="1", operation=operation)
        metrics.observe_request(served, code="", seconds=0.25)
        metrics.observe_request(served, code="", seconds=0.25)
    for code in ERRORS:
        metrics.observe_request(served, code=code, seconds=0.5)
    for stage, seconds in STAGES.items():
        for _ in range(5):
            metrics.stage_seconds.labels(stage, "m", "1", "predict").observe(seconds)
    return metrics.exposition().decode()


def test_rules_give_triton_s_names() -> None:
    stages = ("queue", "compute_input", "compute_infer", "compute_output")
    assert {rule["record"] for rule in RULES} == {
        "nv_inference_request_success",
        "nv_inference_request_failure",
        "nv_inference_count",
        "nv_inference_exec_count",
        "nv_inference_request_duration_us",
        *(f"nv_inference_{stage}_duration_us" for stage in stages),
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["expr"])
def test_rules_use_metrics_and_labels_that_exist(rule: dict, exposition: str) -> None:
    assert balanced(rule["expr"])
    (labels,) = evaluate(rule, samples_of(exposition))
    assert dict(labels) == {"model": "m", "version": "1", **rule.get("labels", {})}


def test_rules_add_up(exposition: str) -> None:
    found = recorded(exposition)
    failures = {
        dict(labels)["reason"]: value
        for labels, value in found.pop("nv_inference_request_failure").items()
    }
    codes = len(ERRORS)
    assert failures == {"REJECTED": 1, "CANCELED": 1, "BACKEND": 3, "OTHER": codes - 5}
    values = {name: value for name, by_labels in found.items() for value in by_labels.values()}
    assert values == pytest.approx(
        {
            "nv_inference_request_success": 4,
            "nv_inference_count": 5,
            "nv_inference_exec_count": 10,
            "nv_inference_request_duration_us": 1e6 * (4 * 0.25 + codes * 0.5),
            "nv_inference_compute_input_duration_us": 5000,
            "nv_inference_queue_duration_us": 10_000,
            "nv_inference_compute_infer_duration_us": 20_000,
            "nv_inference_compute_output_duration_us": 40_000,
        }
    )
