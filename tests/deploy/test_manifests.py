"""Manifests say what Kubernetes accepts, and name only what the service has."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.main import get_command

from service.api.app import create_app
from service.cli.main import app as command_line
from service.configuration import load_settings
from service.settings import Settings
from tests.deploy.manifests import (
    CHART,
    FILES,
    ROOT,
    VARIANTS,
    helm,
    of_kind,
    pods,
    rendered,
    written,
)
from tests.fakes import FakePool

KUBERNETES = "1.35"
CORE_GROUPS = ("v1", "apps/", "autoscaling/", "policy/", "networking.k8s.io/")
KNOWN_FLAGS = {
    flag
    for parameter in get_command(command_line).commands["serve"].params
    for flag in parameter.opts
}

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def settings_of(container: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The configuration that a container's variables and flags amount to."""
    for name in [name for name in os.environ if name.startswith("HEATLENS_")]:
        monkeypatch.delenv(name)
    for variable in container.get("env", []):
        monkeypatch.setenv(variable["name"], variable["value"])
    if container.get("envFrom"):
        monkeypatch.setenv("HEATLENS_SECURITY__API_KEYS", "the secret's")
    flags = dict(arg.split("=", 1) for arg in container.get("args", []) if "=" in arg)
    port = flags.get("--http_port")
    return load_settings(overrides={"server": {"port": port}} if port else None)


async def check_container(
    container: dict[str, Any], pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(container, monkeypatch)
    (port,) = container["ports"]
    assert port["containerPort"] == settings.server.port
    given = {arg.partition("=")[0] for arg in container.get("args", []) if arg.startswith("-")}
    assert given <= KNOWN_FLAGS
    assert settings.security.require_keys == bool(container.get("envFrom")), "the secret is there"
    assert settings.server.grace_s > settings.limits.max_timeout_s, "longer than any request"
    grace = pod.get("terminationGracePeriodSeconds", 30)
    pause = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [0])
    assert grace > settings.server.grace_s + float(pause[-1]), "killed before it has drained"
    transport = httpx.ASGITransport(app := create_app(settings, FakePool()))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service") as client,
    ):
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            if name in container:
                probe = container[name]["httpGet"]
                assert probe["port"] in {port["name"], port["containerPort"]}
                assert (await client.get(probe["path"])).status_code == 200


def check_hardening(container: dict[str, Any], pod: dict[str, Any]) -> None:
    both = {**pod.get("securityContext", {}), **container["securityContext"]}
    assert both["runAsNonRoot"]
    assert both["runAsUser"] == 10001
    assert both["readOnlyRootFilesystem"]
    assert both["allowPrivilegeEscalation"] is False
    assert both["capabilities"] == {"drop": ["ALL"]}
    assert both["seccompProfile"] == {"type": "RuntimeDefault"}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert "emptyDir" in volumes[mounts["/tmp"]], "the service's sockets are files"
    assert set(mounts.values()) <= set(volumes)


# ---------------------------------------------------------------- the chart


def test_helm_has_nothing_to_say_against_the_chart() -> None:
    helm("lint", "--strict", str(CHART))


@every_variant
def test_kubernetes_takes_the_rendered_chart(variant: str) -> None:
    checked = set()
    for resource in rendered(variant):
        if resource["apiVersion"].startswith(CORE_GROUPS):
            kubernetes_validate.validate(resource, KUBERNETES, strict=True)
            checked.add(resource["kind"])
    assert checked >= {"ConfigMap", "Deployment", "PodDisruptionBudget", "Service"}


@every_variant
@pytest.mark.anyio
async def test_pods_of_the_chart_fit_the_service(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = rendered(variant)
    deployment = of_kind("Deployment", resources)
    (pod,) = pods(deployment)
    (container,) = pod["containers"]
    check_hardening(container, pod)
    await check_container(container, pod, monkeypatch)
    ports = {port["name"] for port in container["ports"]}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    service = of_kind("Service", resources)
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert service["spec"]["selector"].items() <= labels.items()
    # What lies at the path of --config is in the map, and is a configuration.
    config = of_kind("ConfigMap", resources)["data"]
    flag = container["args"].index("--config")
    mount = next(
        m for m in container["volumeMounts"] if m["mountPath"] == container["args"][flag + 1]
    )
    assert tomllib.loads(config[mount["subPath"]])["models"]


def test_a_chart_with_everything_has_what_was_asked_for() -> None:
    (pod,) = pods(of_kind("Deployment", rendered("everything")))
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert {"name": "HEATLENS_SERVER__LOG_LEVEL", "value": "debug"} in container["env"]
    assert pod["terminationGracePeriodSeconds"] == 15 + 300 + 5 + 10


def test_a_chart_without_keys_is_open_by_choice_only() -> None:
    closed, opened = (
        next(pods(of_kind("Deployment", rendered(variant))))["containers"][0]
        for variant in ("defaults", "keda")
    )
    assert closed["envFrom"]
    assert {"name": "HEATLENS_SECURITY__REQUIRE_KEYS", "value": "true"} in closed["env"]
    assert "envFrom" not in opened


def test_scalers_and_monitor_find_the_pods() -> None:
    hpa = of_kind("HorizontalPodAutoscaler", rendered("hpa"))["spec"]
    keda = of_kind("ScaledObject", rendered("keda"))["spec"]
    name = of_kind("Deployment", rendered("keda"))["metadata"]["name"]
    assert hpa["scaleTargetRef"]["name"] == keda["scaleTargetRef"]["name"] == name
    assert hpa["metrics"][0]["pods"]["target"]["averageValue"] == "500m"
    (trigger,) = keda["triggers"]
    assert trigger["metadata"]["threshold"] == "0.5"
    assert f'namespace="vision", pod=~"{name}-.*"' in trigger["metadata"]["query"]
    monitor = of_kind("PodMonitor", rendered("hpa"))
    assert monitor["metadata"]["labels"]["release"] == "mine"
    labels = of_kind("Deployment", rendered("hpa"))["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert "replicas" not in of_kind("Deployment", rendered("hpa"))["spec"], "the scaler's business"


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("replica=3", "replica"),
        ("autoscaling.kind=magic", "kind"),
        ("service.port=0", "port"),
        ("longestRequestSeconds=4000", "longestRequestSeconds"),
        ("image.repository=", "repository"),
        ("podMonitor.interval=often", "interval"),
    ],
)
def test_wrong_values_are_refused_by_name(value: str, key: str) -> None:
    assert key in helm("template", "heat", str(CHART), "--set", value, succeeds=False)


def test_every_value_is_explained_and_in_the_schema() -> None:
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    assert values.keys() == schema["properties"].keys() - {"global"}
    for name, section in values.items():
        known = schema["properties"][name].get("properties")
        if isinstance(section, dict) and known and name != "resources":
            assert section.keys() == known.keys(), name


def test_the_chart_has_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]
    for path in FILES:
        for image in [
            c["image"] for doc in written(path) for p in pods(doc) for c in p["containers"]
        ]:
            assert image.removesuffix("-ray").endswith(f":{project['version']}")


# ---------------------------------------------------------------- KServe, KubeRay


@every_file
@pytest.mark.anyio
async def test_pods_of_the_files_fit_the_service(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for resource in written(path):
        for pod in pods(resource):
            for container in pod["containers"]:
                check_hardening(container, pod)
                if "args" in container:
                    await check_container(container, pod, monkeypatch)


@pytest.mark.parametrize(
    "resource",
    [
        *(pytest.param(doc, id=path.stem) for path in FILES for doc in written(path)),
        pytest.param(("keda", "ScaledObject"), id="keda"),
        pytest.param(("hpa", "PodMonitor"), id="podmonitor"),
    ],
)
def test_custom_resources_fit_their_definitions(resource: Any) -> None:
    """Needs the operators' CustomResourceDefinitions as YAML in the folder `build/crds`."""
    if isinstance(resource, tuple):
        variant, kind = resource
        resource = of_kind(kind, rendered(variant))
    group, _, version = resource["apiVersion"].partition("/")
    for path in (ROOT / "build/crds").glob("*.yaml"):
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        if (definition["group"], definition["names"]["kind"]) == (group, resource["kind"]):
            (schema,) = [
                item["schema"]["openAPIV3Schema"]
                for item in definition["versions"]
                if item["name"] == version
            ]
            Draft202012Validator(closed(schema)).validate(resource)
            return
    pytest.skip(f"build/crds has no definition of {resource['kind']}")


def closed(schema: Any) -> Any:
    """The schema with every object closed that lists its fields, as `strict` decoding does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if "properties" in found and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    return found
