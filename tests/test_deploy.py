"""Files for those who watch the service: complete, and in agreement with each other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

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
