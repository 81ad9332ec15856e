"""The numbers of a report, against values worked out by hand."""

import numpy as np
import pytest

from service.cli.report import analysis
from service.cli.report.records import Record


def record(values=((1.0,),), *, true=0, predicted=0, confidence=0.9, **fields):
    fields = {"region": (0, 0, 100, 100), "size": (100, 100), **fields}
    return Record(
        path="a",
        class_id=true,
        predicted=predicted,
        confidence=confidence,
        values=[list(row) for row in values],
        **fields,
    )


def test_an_interval_is_wilsons():
    share = analysis.proportion(8, 10)
    assert (share.low, share.high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )
    none = analysis.proportion(0, 10)
    assert (none.low, none.high) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert analysis.proportion(0, 0).high == 1.0


def test_calibration_error_is_the_weighted_gap():
    records = [record(confidence=0.95)] * 3 + [record(confidence=0.95, predicted=1)]
    records += [record(confidence=0.55)] * 4
    found = analysis.calibration(records)
    assert found.ece == pytest.approx(0.5 * abs(0.95 - 0.75) + 0.5 * abs(0.55 - 1.0))
    assert [item.count for item in found.bins] == [4, 4]


def test_an_even_map_has_the_border_of_its_area():
    found = analysis.attribution([record(np.ones((7, 7)))])
    assert found.border_area == pytest.approx(1 - 0.8**2)
    assert found.border == pytest.approx(found.border_area)


def test_attribution_in_a_box_is_counted_by_area():
    values = np.zeros((4, 4))
    values[0, 0] = 3.0
    values[3, 3] = 1.0
    # The box covers the left upper quarter of the image, and half of it is outside the crop.
    boxed = record(values, box=(0, 0, 50, 50), region=(0, 0, 100, 100))
    found = analysis.attribution([boxed])
    assert found.box == pytest.approx(0.75)
    assert found.box_area == pytest.approx(0.25)
    assert found.box_cut == pytest.approx(0.0)
    cropped = record(values, box=(0, 0, 50, 50), region=(25, 0, 50, 100))
    assert analysis.attribution([cropped]).box_cut == pytest.approx(0.5)


def test_what_the_crop_hides_is_told():
    found = analysis.attribution([record(size=(200, 100), region=(50, 0, 100, 100))])
    assert found.unseen == pytest.approx(0.5)


def test_classes_with_the_least_recall_come_first():
    records = [record(true=0), record(true=1, predicted=0), record(true=1, predicted=1)]
    worst, best = analysis.class_rows(records, ["a", "b"])
    assert (worst.label, worst.recall.value, worst.precision.value) == ("b", 0.5, 1.0)
    assert best.precision.value == 0.5
    (confusion,) = analysis.confusions(records, ["a", "b"])
    assert (confusion.true, confusion.predicted, confusion.count) == ("b", "a", 1)
