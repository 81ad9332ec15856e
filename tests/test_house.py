"""Rules of the house that no other tool checks: hooks in one file, no torch in front, files that agree."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from models.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LONGEST_FILE = 400  # about 300 is the habit; this is the fence

SHARED = ("models.types", "models.errors", "models.catalog", "models.price", "models.resolve")
SHARED_PACKAGES = ("models.methods", "models.sources")
TORCH_FREE_TREES = ("models/imaging", "service")


def source_files() -> list[Path]:
    return [path for tree in ("models", "service") for path in sorted((ROOT / tree).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def torch_free_modules() -> list[str]:
    found = {module_name(path) for tree in TORCH_FREE_TREES for path in (ROOT / tree).rglob("*.py")}
    if find_spec("grpc_health") is None:
        # The extra `grpc` is not installed.
        found = {name for name in found if not name.startswith("service.grpc.")}
    return sorted(found.union(SHARED, SHARED_PACKAGES) - {"service.__main__"})


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


# ---------------------------------------------------------------- code


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_only_hooks_registers_hooks(path: Path) -> None:
    if path == ROOT / "models" / "hooks.py":
        return
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and re.fullmatch(r"register_\w*hook", node.attr)
    ]
    assert not calls, f"{path}: hooks are registered in models/hooks.py only, not on lines {calls}"


def test_hooks_does_register_hooks() -> None:
    """Guards the test above: the pattern still finds what it looks for."""
    assert re.search(r"\.register_\w*hook\(", (ROOT / "models" / "hooks.py").read_text())


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


def test_no_torch_in_front() -> None:
    """Importing everything that HTTP processes may import leaves torch out."""
    program = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = {"torch", "torchvision", "timm"} & set(sys.modules)
    if heavy:
        sys.exit(f"{name} imports {heavy}")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *torch_free_modules()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_every_method_is_a_function_of_its_family(method: Any) -> None:
    family = importlib.import_module(f"models.methods.{method.family}")
    function = getattr(family, method.name)
    assert callable(function)
    assert function.__doc__


# ---------------------------------------------------------------- files


def test_no_host_and_no_path_of_a_machine_is_tracked() -> None:
    # Written as patterns, so that this file does not find itself.
    hosts = ["pypi" r"\.org", "files" r"\.pythonhosted", "npmjs" r"\.org", "deb" r"\.debian\.org"]
    paths = ["/[w]ork/", "/[f]arm/", "/[t]mp/heatlens", "/[r]oot/"]
    forbidden = re.compile("|".join(hosts + paths))
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found = forbidden.search(text)
        assert found is None, f"{path.relative_to(ROOT)} names {found and found.group()}"


def test_versions_agree() -> None:
    assert metadata.version("heatlens") == PROJECT["version"]
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    released = [Version(heading) for heading in headings[1:]]
    assert released == sorted(released, reverse=True)
    assert not released or released[0] == Version(PROJECT["version"])


def test_every_requirement_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert "+" not in version, f"{line}: a local version is one machine's"
            pins[canonicalize_name(name)] = version
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(item for extra in extras for item in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(phony[1].split()) == targets
    # No variable of an outer make may reach this one.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    shown = subprocess.run(
        ["make", "--no-print-directory"],
        cwd=ROOT,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert {line.split()[0] for line in shown.splitlines()} == targets


def test_make_finds_every_process_test() -> None:
    found = re.search(r"^PROCESS_TESTS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found
    folders = [ROOT / name for name in found[1].split()]
    for path in (ROOT / "tests").rglob("test_*.py"):
        if "mark.process" in path.read_text() and path != Path(__file__).resolve():
            assert any(path.is_relative_to(folder) for folder in folders), path


def test_ci_runs_make_check() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make check" in script.read_text()


# ---------------------------------------------------------------- documentation


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_path_that_the_maps_name_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    paths = set(re.findall(r"`((?:service|models|tests|benchmarks|deploy|docs)/[\w./*]*)`", text))
    assert len(paths) > 10
    missing = [path for path in paths if not list(ROOT.glob(path.rstrip("/")))]
    assert not missing


@pytest.mark.parametrize("tree", ["service", "models"])
def test_the_maps_name_every_folder(tree: str) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = {path.parent for path in (ROOT / tree).rglob("*.py")} - {ROOT / tree}
    names = [f"{folder.relative_to(ROOT)}/" for folder in folders]
    assert not [name for name in names if f"`{name}`" not in text]


# ---------------------------------------------------------------- containers


def dockerfile() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile: (keyword, rest), continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    pairs = (line.strip().partition(" ") for line in lines if line.strip())
    return [(keyword, rest.strip()) for keyword, _, rest in pairs]


def test_image_is_safe_by_default() -> None:
    steps = dockerfile()
    stages = [i for i, (keyword, _) in enumerate(steps) if keyword == "FROM"]
    runtime = dict(steps[stages[-1] :])
    # One from outside, of which the others are made; the last one is what is shipped.
    assert [steps[i][1].partition(" ")[0] for i in stages] == ["${BASE_IMAGE}", *["base"] * 3]
    assert runtime["USER"].isdecimal()
    assert int(runtime["USER"]) > 0
    assert runtime["ENTRYPOINT"].startswith("[")  # exec form: signals reach the supervisor
    assert runtime["CMD"].startswith("[")
    assert "/readyz" in runtime["HEALTHCHECK"]
    assert not any(keyword == "RUN" for keyword, _ in steps[stages[-1] :])


def test_image_copies_only_what_is_let_in() -> None:
    ignore = (ROOT / ".dockerignore").read_text().split()
    assert "*" in ignore
    for keyword, rest in dockerfile():
        if keyword == "COPY" and "--from" not in rest:
            for name in rest.split()[:-1]:
                assert (ROOT / name).exists(), name
                assert f"!{name}" in ignore, name
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    for pattern in tools["setuptools"]["packages"]["find"]["include"]:
        assert ("COPY", f"{pattern[:-1]} {pattern[:-1]}") in dockerfile(), "a package is missing"


def test_compose_file_says_what_it_must() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    service = compose["services"]["heatlens"]
    assert "/readyz" in service["healthcheck"]["test"][-1]
    assert service["stop_grace_period"]
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert service["ports"][0].startswith("127.0.0.1:")  # no key is configured by default
    config = tomllib.loads(compose["configs"]["heatlens"]["content"])
    from models.catalog import ModelSpec

    names = [ModelSpec.model_validate(entry).name for entry in config["models"]]
    assert config["default_model"] in names
