"""Models loaded, replaced and unloaded on a real engine under steady requests.

Each response comes from a single model.
"""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from fake_engine import image_of
from traffic import Traffic, png

pytestmark = [pytest.mark.process, pytest.mark.slow]

ADMIN = {"X-API-Key": "admin"}
SERVER = {"port": 0, "devices": ["cpu:0", "cpu:1"], "http_workers": 1, "grace_s": 5}
TARGETS = "?model={}&outputs=values&statistics=false"


def entry(factory: str, prefix: str, version: str = "1", name: str = "m") -> dict[str, object]:
    return {
        "name": name,
        "version": version,
        "source": f"python:tiny_models:{factory}",
        "weights": "none",
        "labels": [f"{prefix}-{i}" for i in range(3)],
        "num_classes": 3,
    }


def admin(running, path: str, body: dict | None = None) -> httpx.Response:
    return httpx.post(
        running.service.url(f"/v2/repository/{path}"),
        headers=ADMIN,
        json=body,
        timeout=60,
        trust_env=False,
    )


def explain(running, model: str) -> Traffic:
    url = running.service.url("/v1/explain" + TARGETS.format(model))
    images = [png(image_of(n)) for n in range(8)]
    return Traffic(
        url,
        lambda number, i: images[(number + i) % 8],
        clients=2,
        pause_s=0.005,
        headers={"X-API-Key": "one"},
    )


def winners(traffic: Traffic) -> list[str]:
    """The winning classes, after a check that each response is consistent."""
    found = []
    for answer in traffic.answers:
        body = answer.json()
        (result,) = body["results"]
        best = result["predictions"][0]
        (explanation,) = result["explanations"]
        assert explanation["target"]["class_id"] == best["class_id"]
        assert explanation["target"]["label"] == best["label"]
        found.append(f"{body['model']['version']}:{best['class_id']}:{best['label']}")
    return found


def test_models_come_change_and_go_under_traffic(configured, monkeypatch):
    one, two = entry("first", "old"), entry("second", "v2", version="2")
    # The folder of tiny_models.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    running = configured("real-worker", server=SERVER, models=[one], default_model="m")
    workers = running.service.workers()
    with explain(running, "m") as newest, explain(running, "m@1") as pinned:
        newest.after(10)
        pinned.after(10)

        running.write(server=SERVER, models=[one, two], default_model="m")
        assert admin(running, "models/m@2/load").status_code == 200
        newest.after(10)
        pinned.after(10)
        # The same version, but another network with other labels.
        running.write(server=SERVER, models=[entry("second", "new"), two], default_model="m")
        assert admin(running, "models/m@1/load").status_code == 200
        pinned.after(10)

        running.write(server=SERVER, models=[entry("broken", "bad"), two], default_model="m")
        failed = admin(running, "models/m@1/load")
        assert (failed.status_code, failed.json()["code"]) == (422, "model_load_failed")
        assert "no such luck" not in failed.text
        pinned.after(10)

        assert admin(running, "models/m@2/unload").status_code == 200
        newest.after(20)
    assert newest.errors == pinned.errors == []
    assert newest.statuses() == pinned.statuses() == {200}
    changes = winners(pinned)
    assert set(changes) == {"1:0:old-0", "1:1:new-1"}, "labels of one model with another's answer"
    assert changes[0] == "1:0:old-0"
    assert changes[-1] == "1:1:new-1"
    changes = winners(newest)
    assert set(changes) <= {"1:0:old-0", "2:1:v2-1", "1:1:new-1"}
    assert (changes[0], changes[-1]) == ("1:0:old-0", "1:1:new-1")
    assert "2:1:v2-1" in changes
    index = admin(running, "index").json()
    assert {(m["version"], m["state"]) for m in index} == {("1", "READY"), ("2", "UNAVAILABLE")}
    assert running.service.workers() == workers != set(), "a worker was restarted"
