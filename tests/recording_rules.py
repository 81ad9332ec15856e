"""Evaluates our recording rules for Prometheus against what the service exposes."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

FILE = Path(__file__).resolve().parents[1] / "deploy/prometheus/triton.yml"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(FILE.read_text())["groups"] for rule in group["rules"]
]

# Prometheus adds these to whatever it scrapes.
TARGET_LABELS = {"job": "heatlens", "instance": "heatlens:8000"}

Labels = frozenset[tuple[str, str]]

_EXPRESSION = re.compile(
    r"(?:(?P<factor>\S+) \* )?sum by \((?P<by>[a-z, ]+)\)\s+"
    r"\((?P<metric>\w+)(?:\{(?P<only>.+)\})?\)"
)
_MATCHER = re.compile(r'(?P<label>\w+)(?P<operator>=~|!~|=)"(?P<value>[^"]*)"')


def samples_of(exposition: str) -> list[Sample]:
    """All samples of a scrape."""
    return [
        sample for family in text_string_to_metric_families(exposition) for sample in family.samples
    ]


def evaluate(rule: dict[str, Any], samples: list[Sample]) -> dict[Labels, float]:
    """Values of a rule by their labels, without those of the target.

    Raises:
        AssertionError: the expression is not understood, or its metric does not exist.
        KeyError: the metric lacks a label.
    """
    parsed = _EXPRESSION.fullmatch(rule["expr"])
    assert parsed, f"not understood: {rule['expr']}"
    matchers = [match.groups() for match in _MATCHER.finditer(parsed["only"] or "")]
    own = [sample for sample in samples if sample.name == parsed["metric"]]
    assert own, f"no metric {parsed['metric']}"
    sums: Counter[Labels] = Counter()
    for sample in own:
        labels = sample.labels | TARGET_LABELS
        if all(_matches(labels[label], operator, value) for label, operator, value in matchers):
            kept = {name: labels[name] for name in parsed["by"].split(", ")} | rule.get(
                "labels", {}
            )
            sums[frozenset(kept.items() - TARGET_LABELS.items())] += sample.value
    factor = float(parsed["factor"] or 1)
    return {labels: factor * value for labels, value in sums.items()}


def recorded(exposition: str) -> dict[str, dict[Labels, float]]:
    """Values of all rules by name and labels."""
    samples = samples_of(exposition)
    found: dict[str, dict[Labels, float]] = {}
    for rule in RULES:
        found.setdefault(rule["record"], {}).update(evaluate(rule, samples))
    return found


def _matches(found: str, operator: str, value: str) -> bool:
    if operator == "=":
        return found == value
    return bool(re.fullmatch(value, found)) is (operator == "=~")
