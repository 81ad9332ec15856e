"""Groups of images that the model looks at alike: where shortcuts show.

Spectral relevance analysis (Lapuschkin et al. 2019, "Unmasking Clever Hans predictors and assessing
what machines really learn"): maps are clustered by the neighbourhoods they form, and clusters are
looked at, not single images. A cluster that is often wrong, or whose maps share one spot off the
centre and one class, is a reason to look closer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.stats import fisher_exact
from sklearn.cluster import SpectralClustering
from sklearn.neighbors import kneighbors_graph

from models.types import Struct
from service.cli.report.analysis import Proportion, proportion
from service.cli.report.records import Record

LEAST_IMAGES = 20
"""Fewer images are not clustered."""

MOST_IMAGES = 2000
"""So many are clustered at most: time grows with the cube of their number, memory with its square."""

_MOST_CLUSTERS = 8
_SIDE = 16
_RANDOM_SETS = 200
_STRONGEST = 0.1
_FAINT = 1e-4
_SIGNIFICANT = 0.01
_PECULIAR = 4.0
_OFF_CENTRE = 0.2
_PURE = 0.6


class Cluster(Struct):
    """Images with similar maps.

    Attributes:
        members: indices of the records, the most typical first.
        mean: mean of the maps, each scaled to a sum of 1, (h, w).
        spot: where it is strongest, in words.
        errors: share of wrong predictions; `rest_errors` is that of all other images.
        p_errors: probability of so many errors by chance (Fisher's exact test, one-sided).
        concentration: by how many standard deviations the mean is more concentrated than that of
            as many random images.
        label: the class that is predicted most; `purity` is its share, `prior` its share overall.
        suspicious: whether one should look closer.
    """

    members: tuple[int, ...]
    mean: list[list[float]]
    spot: str
    off_centre: float
    errors: Proportion
    rest_errors: float
    p_errors: float
    concentration: float
    label: str
    purity: float
    prior: float

    @property
    def suspicious(self) -> bool:
        """Whether it predicts errors, or one spot off the centre goes with one class."""
        peculiar = self.concentration > _PECULIAR and self.off_centre > _OFF_CENTRE
        one_class = self.purity >= _PURE and self.purity > 1.5 * self.prior
        return self.p_errors < _SIGNIFICANT or (peculiar and one_class)


def spread(records: Sequence[Record], *, most: int = MOST_IMAGES) -> Sequence[Record]:
    """At most so many records, spread evenly over all."""
    return records[:: -(-len(records) // most)]


def find_clusters(records: Sequence[Record], labels: Sequence[str]) -> list[Cluster]:
    """Cluster the maps of images; clusters that predict errors come first, then peculiar ones.

    Fewer than `LEAST_IMAGES` images, and maps that show nothing, are not clustered.
    """
    usable = [index for index, record in enumerate(records) if record.map.sum() > 0]
    if len(usable) < LEAST_IMAGES:
        return []
    maps = np.stack([_unit(records[index].map) for index in usable])
    # Of shares, the square root: distances are then those of Hellinger.
    features = np.sqrt(np.stack([_shrunk(values).ravel() for values in maps]))
    assigned = _assign(features)
    clusters = []
    for number in np.unique(assigned):
        inside = np.flatnonzero(assigned == number)
        typical = inside[
            np.argsort(np.linalg.norm(features[inside] - features[inside].mean(0), axis=1))
        ]
        clusters.append(
            _describe([usable[i] for i in typical], maps[inside], maps, records, labels)
        )
    return sorted(
        clusters, key=lambda c: (not c.suspicious, round(c.p_errors, 3), -c.concentration)
    )


def _assign(features: np.ndarray) -> np.ndarray:
    """The cluster of each row, by the eigenvectors of the graph of its nearest neighbours."""
    neighbours = min(len(features) - 1, max(5, int(2 * np.log(len(features)))))
    graph = kneighbors_graph(features, neighbours, include_self=True)
    # Faint links between all keep a graph of several islands connected.
    affinity = (0.5 * (graph + graph.T)).toarray() + _FAINT
    count = _cluster_count(affinity)
    model = SpectralClustering(
        count, affinity="precomputed", assign_labels="cluster_qr", random_state=0
    )
    assigned: np.ndarray = model.fit_predict(affinity)
    return assigned


def _cluster_count(affinity: np.ndarray) -> int:
    """The number with the widest gap to the next eigenvalue (von Luxburg 2007, section 8.3)."""
    degree = affinity.sum(1) ** -0.5
    laplacian = np.eye(len(affinity)) - degree[:, None] * affinity * degree[None]
    most = min(_MOST_CLUSTERS, len(affinity) // 8)
    values = np.linalg.eigvalsh(laplacian)[: most + 1]
    return 2 + int(np.argmax(np.diff(values)[1:])) if most > 2 else 2


def _describe(
    members: Sequence[int],
    own: np.ndarray,
    maps: np.ndarray,
    records: Sequence[Record],
    labels: Sequence[str],
) -> Cluster:
    mean = own.mean(0)
    wrong = sum(not records[index].correct for index in members)
    all_wrong = sum(not record.correct for record in records)
    others = len(records) - len(members)
    table = [[wrong, len(members) - wrong], [all_wrong - wrong, others - (all_wrong - wrong)]]
    predicted, count = Counter(records[index].predicted for index in members).most_common(1)[0]
    spot, off_centre = _spot(mean)
    return Cluster(
        members=tuple(int(index) for index in members),
        mean=[[round(float(v), 6) for v in row] for row in mean],
        spot=spot,
        off_centre=off_centre,
        errors=proportion(wrong, len(members)),
        rest_errors=(all_wrong - wrong) / others if others else 0.0,
        p_errors=float(fisher_exact(table, alternative="greater").pvalue),
        concentration=_concentration(mean, maps, len(members)),
        label=labels[predicted],
        purity=count / len(members),
        prior=sum(record.predicted == predicted for record in records) / len(records),
    )


def _concentration(mean: np.ndarray, maps: np.ndarray, size: int) -> float:
    """Standard scores of the share of the strongest cells, against random sets of maps."""
    rng = np.random.default_rng(0)
    sets = (rng.choice(len(maps), size, replace=False) for _ in range(_RANDOM_SETS))
    random = np.array([_strongest_share(maps[chosen].mean(0)) for chosen in sets])
    return float((_strongest_share(mean) - random.mean()) / max(random.std(), 1e-6))


def _strongest_share(mean: np.ndarray) -> float:
    count = max(1, int(_STRONGEST * mean.size))
    return float(np.partition(mean, -count, axis=None)[-count:].sum())


def _spot(mean: np.ndarray) -> tuple[str, float]:
    """Where the strongest cells lie, in words, and how far from the centre (0 to 0.7)."""
    count = max(1, int(_STRONGEST * mean.size))
    strongest = np.argpartition(mean, -count, axis=None)[-count:]
    rows, columns = np.unravel_index(strongest, mean.shape)
    y = float((rows.mean() + 0.5) / mean.shape[0])
    x = float((columns.mean() + 0.5) / mean.shape[1])
    across, down = _third(x, ("left", "centre", "right")), _third(y, ("top", "middle", "bottom"))
    words = "centre" if (across, down) == ("centre", "middle") else f"{down} {across}"
    return words, float(np.hypot(x - 0.5, y - 0.5))


def _third(position: float, names: tuple[str, str, str]) -> str:
    return names[min(2, int(3 * position))]


def _unit(values: np.ndarray) -> np.ndarray:
    unit: np.ndarray = values / values.sum()
    return unit


def _shrunk(values: np.ndarray) -> np.ndarray:
    """A map of at most 16 cells a side, by sums of its cells."""
    rows, columns = (_bins(side) for side in values.shape)
    shrunk: np.ndarray = rows @ values @ columns.T
    return shrunk


def _bins(side: int) -> np.ndarray:
    count = min(side, _SIDE)
    bins = np.zeros((count, side))
    bins[np.arange(side) * count // side, np.arange(side)] = 1
    return bins
