"""A planted shortcut is the first cluster, and maps without one raise no alarm."""

from itertools import pairwise

import numpy as np
import pytest

from service.cli.report.clusters import LEAST_IMAGES, find_clusters, spread
from service.cli.report.page import sentence
from service.cli.report.records import Record

LABELS = ["cat", "dog", "horse"]


def blob(y, x, rng, *, width=1.2):
    rows, columns = np.mgrid[:7, :7]
    values = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * width**2))
    return values + 0.05 * rng.random((7, 7))


def record(values, *, true, predicted):
    return Record(
        path="a", class_id=true, predicted=predicted, confidence=0.9, values=values.tolist()
    )


def objects(rng, count):
    """Maps around the middle, as objects lie there."""
    for index in range(count):
        y, x = rng.normal(3, 0.7, 2)
        yield record(blob(y, x, rng), true=index % 3, predicted=index % 3)


def test_errors_that_share_a_spot_come_first():
    rng = np.random.default_rng(0)
    records = list(objects(rng, 90))
    records += [
        record(blob(6, 0, rng, width=0.6), true=index % 3, predicted=1) for index in range(30)
    ]
    first, *others = find_clusters(records, LABELS)
    assert first.suspicious
    assert first.spot == "bottom left"
    assert first.label == "dog"
    assert first.errors.value == pytest.approx(2 / 3, abs=0.1)
    assert first.p_errors < 1e-6
    assert not any(cluster.suspicious for cluster in others)
    assert {records[index].predicted for index in first.members} == {1}
    text = sentence(first)
    assert "bottom left" in text
    assert "dog" in text


def test_a_spot_that_goes_with_a_class_is_suspicious_without_errors():
    rng = np.random.default_rng(1)
    records = list(objects(rng, 90))
    records += [record(blob(0, 6, rng, width=0.6), true=2, predicted=2) for _ in range(30)]
    first = find_clusters(records, LABELS)[0]
    assert first.suspicious
    assert first.spot == "top right"
    assert first.errors.count == 0


def test_objects_alone_raise_no_alarm():
    rng = np.random.default_rng(2)
    clusters = find_clusters(list(objects(rng, 120)), LABELS)
    assert clusters
    assert not any(cluster.suspicious for cluster in clusters)


def test_few_images_are_not_clustered():
    rng = np.random.default_rng(3)
    assert find_clusters(list(objects(rng, LEAST_IMAGES - 1)), LABELS) == []


def test_maps_that_show_nothing_are_left_out():
    rng = np.random.default_rng(4)
    empty = record(np.zeros((7, 7)), true=0, predicted=0)
    clusters = find_clusters([empty, *objects(rng, 40)], LABELS)
    assert all(0 not in cluster.members for cluster in clusters)


@pytest.mark.parametrize(("count", "left"), [(5, 5), (10, 10), (11, 6), (95, 10)])
def test_a_large_data_set_is_thinned_out_evenly(count, left):
    kept = spread([record(np.ones((1, 1)), true=i, predicted=i) for i in range(count)], most=10)
    assert len(kept) == left
    assert len({b.class_id - a.class_id for a, b in pairwise(kept)}) == 1
