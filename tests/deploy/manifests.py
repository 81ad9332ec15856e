"""The manifests of `deploy/`, the chart rendered by helm among them, and what is in them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm"
FILES = [
    *sorted((ROOT / "deploy/kserve").glob("*.yaml")),
    ROOT / "deploy/ray_serve/rayservice.yaml",
]

VARIANTS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "hpa": ("autoscaling.kind=hpa", "podMonitor.enabled=true", "podMonitor.labels.release=mine"),
    "keda": ("autoscaling.kind=keda", "networkPolicy.enabled=false", "keysSecret="),
    "everything": (
        "gpus=2",
        "weightsClaim=weights",
        "keysSecret=keys",
        "pullSecrets[0].name=registry",
        "env[0].name=HEATLENS_SERVER__LOG_LEVEL",
        "env[0].value=debug",
        "longestRequestSeconds=300",
        "drainDelaySeconds=15",
        "tolerations[0].key=gpu",
        "nodeSelector.gpu=yes",
        "networkPolicy.from[0].podSelector.matchLabels.app=web",
        "networkPolicy.egress[0].ports[0].port=4318",
    ),
}
"""Values to render the chart with."""

Resource = dict[str, Any]


def helm(*arguments: str, succeeds: bool = True) -> str:
    """Run helm; returns what it printed."""
    beside = Path(sys.executable).with_name("helm")
    program = shutil.which("helm") or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("helm is not installed (make helm)")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
    return done.stdout + done.stderr


@cache
def rendered(variant: str) -> tuple[Resource, ...]:
    """The resources of the chart."""
    settings = [part for value in VARIANTS[variant] for part in ("--set", value)]
    text = helm("template", "heat", str(CHART), "--namespace", "vision", *settings)
    return tuple(doc for doc in yaml.safe_load_all(text) if doc)


def written(path: Path) -> list[Resource]:
    """The resources of a file."""
    return [doc for doc in yaml.safe_load_all(path.read_text()) if doc]


def of_kind(kind: str, resources: tuple[Resource, ...]) -> Resource:
    """The one resource of a kind."""
    (found,) = [item for item in resources if item["kind"] == kind]
    return found


def pods(value: object) -> Iterator[dict[str, Any]]:
    """Every specification of a pod within a resource."""
    if isinstance(value, Mapping):
        if isinstance(value.get("containers"), list):
            yield dict(value)
        for item in value.values():
            yield from pods(item)
    elif isinstance(value, list):
        for item in value:
            yield from pods(item)
