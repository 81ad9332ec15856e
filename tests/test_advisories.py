"""No version with a known fault is allowed, or pinned."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
ADVISORIES = tomllib.loads((ROOT / "deploy/advisories.toml").read_text())["advisory"]


@pytest.mark.parametrize("advisory", ADVISORIES, ids=lambda each: each["package"])
def test_versions_with_known_faults_are_excluded(advisory: dict[str, object]) -> None:
    package, fixed = str(advisory["package"]), Version(str(advisory["fixed"]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {r.name: r for r in map(Requirement, project["dependencies"])}
    floors = [s.version for s in required[package].specifier if s.operator == ">="]
    assert floors, f"{package} has no floor"
    assert Version(floors[0]) >= fixed
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert Version(pins[package]) >= fixed
    assert Version(metadata.version(package)) >= fixed
