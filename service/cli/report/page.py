"""The report as one self-contained HTML page: pictures inside, charts as SVG, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from models.types import Struct
from service.cli.report.analysis import Attribution, Calibration, ClassRow, Confusion, Proportion
from service.cli.report.charts import calibration_chart, interval_bar, map_image
from service.cli.report.clusters import Cluster
from service.cli.report.pictures import Shown

_MOST_ROWS = 40

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --dim: #5d6570; --line: #d9dde3; --paper: #fff;
  --card: #f6f7f9; --accent: #2563eb; --alarm: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --dim: #a2a9b4; --line: #3a4049;
  --paper: #15181c; --card: #1e2227; --accent: #7aa7ff; --alarm: #ff8a80; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1080px; margin: 0 auto; padding: 24px; }
h1 { margin: 0 0 4px; } h2 { margin: 40px 0 8px; border-bottom: 1px solid var(--line); }
h3 { margin: 20px 0 4px; } .dim { color: var(--dim); } small { color: var(--dim); }
.numbers { display: flex; flex-wrap: wrap; gap: 16px; margin: 16px 0; }
.number { background: var(--card); border-radius: 10px; padding: 12px 18px; min-width: 150px; }
.number b { display: block; font-size: 1.6rem; }
.finding { border-left: 5px solid var(--alarm); background: var(--card); padding: 12px 16px;
  border-radius: 0 10px 10px 0; margin: 12px 0; }
.cluster { display: grid; grid-template-columns: 170px 1fr; gap: 16px; margin: 16px 0;
  break-inside: avoid; }
.row { display: flex; flex-wrap: wrap; gap: 8px; } figure { margin: 0; width: 130px; }
.error figure { width: 170px; }
figure img, .cluster > img { width: 100%; border-radius: 6px; display: block; }
figcaption { font-size: .8rem; color: var(--dim); overflow-wrap: anywhere; }
.error { border-top: 1px solid var(--line); padding: 12px 0; break-inside: avoid; }
table { border-collapse: collapse; width: 100%; } td, th { padding: 4px 8px; text-align: left;
  border-bottom: 1px solid var(--line); } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 260px; max-width: 100%; } svg text { font-size: 12px; fill: var(--dim); }
svg .bar { fill: var(--accent); } svg .axis { stroke: var(--dim); } svg .track { fill: var(--line); }
svg .diagonal { stroke: var(--dim); stroke-dasharray: 4; } svg .whisker { stroke: var(--ink); }
svg.interval { width: 120px; height: 8px; }
@media print { body { max-width: none; } }
@media (max-width: 620px) { .cluster { grid-template-columns: 1fr; } }
"""


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
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(report.title)}</h1>",
            f'<p class="dim">{report.images:,} images, {escape(report.model)}, ',
            f"maps by {escape(report.method)}</p>",
            _numbers(report),
            _findings(report),
            _clusters(report, clusters, labels),
            _errors(errors, labels),
            _attribution(report.attribution),
            _calibration(report.calibration),
            _faithfulness(report),
            _classes(report.classes),
            _confusions(report.confusions),
            _failures(report.failed),
            "</body></html>",
        )
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
        f" {cluster.errors.value:.0%} of them are wrong, of the other images "
        f"{cluster.rest_errors:.0%}."
    )
    advice = " See whether something there gives the class away: a logo, a date, a border, a tool."
    return seen + taken + wrong + advice


def _numbers(report: Report) -> str:
    accuracy = report.accuracy
    cards = [
        ("accuracy", f"{accuracy.value:.1%}", f"95 %: {accuracy.low:.1%} to {accuracy.high:.1%}"),
        ("wrong", f"{accuracy.total - accuracy.count:,}", f"of {accuracy.total:,}"),
        ("calibration error", f"{report.calibration.ece:.1%}", "expected gap, ten bins"),
        (
            "attribution at the border",
            f"{report.attribution.border:.0%}",
            f"{report.attribution.border_area:.0%} of the area",
        ),
    ]
    tiles = (f'<div class="number"><b>{value}</b>{name}<br><small>{note}</small></div>'
             for name, value, note in cards)  # fmt: skip
    return f'<div class="numbers">{"".join(tiles)}</div>'


def _findings(report: Report) -> str:
    suspicious = [cluster for cluster in report.clusters if cluster.suspicious]
    if not suspicious:
        text = "No group of images stands out by where the model looks."
        if not report.clusters:
            text = "There are too few images to look for groups."
        return f"<h2>Findings</h2><p>{text}</p>"
    items = "".join(f'<div class="finding">{escape(sentence(c))}</div>' for c in suspicious)
    return f"<h2>Findings</h2>{items}"


def _clusters(report: Report, pictures: Sequence[Sequence[Shown]], labels: Sequence[str]) -> str:
    if not report.clusters:
        return ""
    blocks = []
    for number, (cluster, shown) in enumerate(zip(report.clusters, pictures, strict=True), start=1):
        figures = "".join(
            _figure(
                item.pictures[0].source, f"“{labels[item.record.predicted]}” {item.record.path}"
            )
            for item in shown
            if item.pictures
        )
        blocks.append(
            f'<div class="cluster"><img alt="Mean map" src="{map_image(cluster.mean)}"><div>'
            f"<h3>{number}. {escape(cluster.spot)}, {cluster.errors.total} images"
            f"{' ⚠' if cluster.suspicious else ''}</h3>"
            f'<p class="dim">{cluster.errors.value:.0%} wrong (others {cluster.rest_errors:.0%}, '
            f"p = {cluster.p_errors:.2g}); {cluster.purity:.0%} predicted “{escape(cluster.label)}”; "
            f"concentration {cluster.concentration:+.1f} sd</p>"
            f'<div class="row">{figures}</div></div></div>'
        )
    note = (
        "Images whose maps are alike (spectral clustering, Lapuschkin et al. 2019). On the left "
        "the mean map, on the right typical images with the map of their predicted class."
    )
    if report.compared < report.images:
        note += f" {report.compared:,} images, spread over all, were compared."
    return f'<h2>Where the model looks</h2><p class="dim">{note}</p>{"".join(blocks)}'


def _errors(errors: Sequence[Shown], labels: Sequence[str]) -> str:
    if not errors:
        return "<h2>Most confident errors</h2><p>There are none.</p>"
    blocks = []
    for item in errors:
        record = item.record
        figures = "".join(_figure(picture.source, picture.caption) for picture in item.pictures)
        blocks.append(
            f'<div class="error"><b>{escape(labels[record.predicted])}</b> '
            f"({record.confidence:.1%}) in place of <b>{escape(labels[record.class_id])}</b> "
            f"({record.true_probability:.1%}) <small>{escape(record.path)}</small>"
            f'<div class="row">{figures}</div></div>'
        )
    return f"<h2>Most confident errors</h2>{''.join(blocks)}"


def _attribution(found: Attribution) -> str:
    rows = [("at the border (outer tenth on each side)", found.border, found.border_area)]
    if found.box is not None:
        rows.append(("on the boxes of the objects", found.box, found.box_area or 0.0))
    cells = "".join(
        f'<tr><td>{name}</td><td class="n">{share:.1%}</td><td class="n">{area:.1%}</td></tr>'
        for name, share, area in rows
    )
    cut = "" if found.box_cut is None else f" The crop cuts off {found.box_cut:.1%} of the boxes."
    return (
        "<h2>Where the attribution lies</h2><table><tr><th></th>"
        '<th class="n">attribution</th><th class="n">an even map</th></tr>'
        f"{cells}</table><p>The model does not see {found.unseen:.1%} of the images, outside its "
        f"crop.{cut}</p>"
    )


def _calibration(found: Calibration) -> str:
    return (
        f"<h2>Calibration</h2><p>Expected calibration error {found.ece:.1%}. Bars below the "
        f"diagonal: too sure.</p>{calibration_chart(found.bins)}"
    )


def _faithfulness(report: Report) -> str:
    if not report.faithfulness:
        return ""
    rows = "".join(
        f'<tr><td>{name}</td><td class="n">{value:.3f}</td><td class="n">{random:.3f}</td>'
        f'<td class="n">{count}</td></tr>'
        for name, (value, random, count) in report.faithfulness.items()
    )
    return (
        "<h2>Faithfulness of the maps</h2><p>Deletion should be lower than that of a random map, "
        "insertion higher. If they are not, trust the maps less.</p><table><tr><th></th>"
        '<th class="n">maps</th><th class="n">random</th><th class="n">images</th></tr>'
        f"{rows}</table>"
    )


def _classes(rows: Sequence[ClassRow]) -> str:
    cells = "".join(
        f'<tr><td>{escape(row.label)}</td><td class="n">{row.images}</td>'
        f'<td class="n">{row.recall.value:.0%} '
        f"{interval_bar(row.recall.value, row.recall.low, row.recall.high)}</td>"
        f'<td class="n">{row.precision.value:.0%}</td><td class="n">{row.confidence:.0%}</td></tr>'
        for row in rows[:_MOST_ROWS]
    )
    return (
        '<h2>Classes</h2><table><tr><th>class</th><th class="n">images</th><th class="n">recall'
        '</th><th class="n">precision</th><th class="n">confidence</th></tr>'
        f"{cells}</table>{_more(rows, 'classes')}"
    )


def _confusions(rows: Sequence[Confusion]) -> str:
    if not rows:
        return ""
    cells = "".join(
        f"<tr><td>{escape(row.true)}</td><td>{escape(row.predicted)}</td>"
        f'<td class="n">{row.count}</td></tr>'
        for row in rows[:_MOST_ROWS]
    )
    return (
        '<h2>Confusions</h2><table><tr><th>class</th><th>taken for</th><th class="n">images</th>'
        f"</tr>{cells}</table>{_more(rows, 'confusions')}"
    )


def _failures(failed: dict[str, str]) -> str:
    if not failed:
        return ""
    items = "".join(f"<li>{escape(path)}: {escape(why)}</li>" for path, why in failed.items())
    return f"<h2>Images that could not be explained</h2><ul>{items}</ul>"


def _figure(source: str, caption: str) -> str:
    return f'<figure><img alt="" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'


def _more(rows: Iterable[object], what: str) -> str:
    left = len(list(rows)) - _MOST_ROWS
    return f'<p class="dim">{left} more {what} are in the JSON.</p>' if left > 0 else ""
