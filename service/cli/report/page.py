"""The report as one self-contained HTML page: pictures inside, charts as SVG, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment

from models.types import Struct
from service.cli.report.analysis import Attribution, Calibration, ClassRow, Confusion, Proportion
from service.cli.report.clusters import Cluster
from service.cli.report.pictures import Shown, map_image

_TEMPLATE = Path(__file__).with_name("page.html")
_MOST_ROWS = 40


class Report(Struct):
    """Everything that a report says.

    Attributes:
        compared: number of images whose maps were compared to find clusters.
    """

    title: str
    model: str
    method: str
    images: int
    failed: dict[str, str]
    accuracy: Proportion
    calibration: Calibration
    attribution: Attribution
    faithfulness: dict[str, tuple[float, float, int]]
    classes: tuple[ClassRow, ...]
    confusions: tuple[Confusion, ...]
    clusters: tuple[Cluster, ...]
    compared: int


def render_page(
    report: Report,
    *,
    labels: Sequence[str],
    errors: Sequence[Shown],
    clusters: Sequence[Sequence[Shown]],
) -> str:
    """Draw the page; `clusters` are the pictures of each cluster of the report."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda share, digits=0: f"{share:.{digits}%}"
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        labels=labels,
        errors=errors,
        clusters=list(zip(report.clusters, clusters, strict=True)),
        most_rows=_MOST_ROWS,
        sentence=sentence,
        map_image=map_image,
    )


def sentence(cluster: Cluster) -> str:
    """What a suspicious cluster says, as a sentence."""
    total = cluster.errors.total
    seen = f"In {total} images the model looks at the same place, the {cluster.spot} of its input."
    taken = (
        f" It predicts “{cluster.label}” for {cluster.purity:.0%} of them "
        f"({cluster.prior:.0%} of all images)."
    )
    wrong = (
        f" {cluster.errors.value:.0%} of them are wrong, compared with "
        f"{cluster.rest_errors:.0%} of the other images."
    )
    advice = " See whether something there gives the class away: a logo, a date, a border, a tool."
    return seen + taken + wrong + advice
