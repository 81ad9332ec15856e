"""Which methods a model's facts allow."""

from __future__ import annotations

import pytest

from models.methods.applicability import ModelFacts, method_support, supported_methods
from models.methods import METHODS

GAP_LINEAR = ModelFacts(target_layer="layer4", head="gap_linear", closed_form=True)
FLATTEN = ModelFacts(target_layer="features", head="flatten", closed_form=False)
NO_MAP = ModelFacts(target_layer=None, head=None, closed_form=False)


def test_every_method_has_a_row_in_the_tables_order():
    for facts in (GAP_LINEAR, FLATTEN, NO_MAP):
        assert [row.name for row in supported_methods(facts)] == list(METHODS)


@pytest.mark.parametrize("facts", [GAP_LINEAR, FLATTEN, NO_MAP])
def test_a_reason_is_given_exactly_where_a_method_does_not_apply(facts):
    for row in supported_methods(facts):
        assert row.applicable == (row.reason is None)
        if row.reason:
            # It is put after "gradcam cannot explain vgg11: " and before a full stop.
            assert row.reason[0].islower()
            assert not row.reason.endswith(".")


def test_cam_needs_the_proved_closed_form():
    assert method_support(METHODS["cam"], GAP_LINEAR).applicable
    assert "global average pooling" in method_support(METHODS["cam"], FLATTEN).reason


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_that_explain_a_layer_need_a_map(name):
    layered = METHODS[name].family in ("gradient", "activation") or "cam" in name
    reason = method_support(METHODS[name], NO_MAP).reason
    assert layered == (reason is not None and "map of the picture" in reason)


def test_gradient_methods_need_no_particular_head():
    for name in ("gradcam", "gradcam_plus_plus", "xgradcam", "hirescam", "layercam"):
        assert method_support(METHODS[name], FLATTEN).applicable
