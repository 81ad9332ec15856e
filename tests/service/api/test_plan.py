"""Options of any kind give a plan or a typed error; models are found by name and version."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from models.catalog import ModelSpec
from models.errors import HeatlensError, InvalidOption, NotReady, UnknownModel
from models.methods import METHODS
from service.api.body import ImageInput, parse_query
from service.api.json import validate
from service.api.options import (
    AnyOptions,
    ExplainOptions,
    FeaturesOptions,
    PredictOptions,
    list_options,
)
from service.api.plan import choose_model, find_model, make_plan, timeout_s
from service.settings import LimitSettings, Settings
from tests.fakes import LABELS, fake_info

INFO = fake_info()
OPERATIONS: list[type[AnyOptions]] = [PredictOptions, ExplainOptions, FeaturesOptions]

CODES = {"invalid_option", "unknown_label", "unknown_layer", "target_out_of_range"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=3)
    ),
    max_leaves=8,
)
option_names = sorted({name for model in OPERATIONS for name in model.model_fields})
plausible = st.sampled_from(
    [
        "top1",
        "tabby",
        0,
        "1",
        True,
        0.5,
        ["top1"],
        ["auto"],
        ["gradcam"],
        ["output"],
        "jpeg",
        "mean",
    ]
)
some_options = st.dictionaries(
    st.sampled_from(option_names) | st.text(max_size=8), json_values | plausible, max_size=5
)


@given(st.sampled_from(OPERATIONS), some_options)
def test_any_options_give_a_plan_or_an_error_of_ours(
    model: type[AnyOptions], values: dict[str, Any]
) -> None:
    error = None
    try:
        options = validate(model, values)
        plan = make_plan(
            [ImageInput(data=b"x")],
            options,
            INFO,
            limits=LimitSettings(),
            started=0.0,
            deadline=1.0,
        )
    except HeatlensError as caught:
        error = caught
    if error is not None:
        assert error.message.endswith(".")
        assert error.code in CODES
        return
    (image,) = plan.images
    assert set(values) <= set(model.model_fields)
    assert 1 <= image.options.top_k <= len(LABELS)
    assert set(image.options.methods) <= set(METHODS)
    assert set(image.options.layers) <= {layer.name for layer in INFO.layers}
    for target in image.options.targets:
        for ref in (target.cls, *target.against):
            assert 0 <= ref.value - (ref.kind == "rank") < len(LABELS)


@given(st.sampled_from(OPERATIONS), st.lists(st.tuples(st.text(max_size=8), st.text(max_size=20))))
def test_any_query_gives_options_or_an_error_of_ours(
    model: type[AnyOptions], pairs: list[tuple[str, str]]
) -> None:
    error = None
    try:
        validate(model, parse_query(pairs, model))
    except InvalidOption as caught:
        error = caught
    assert error is None or error.field or not all(name for name, _ in pairs)


@given(
    st.lists(
        st.text(
            st.characters(
                exclude_characters=", \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0",
                exclude_categories=["Z"],
            ),
            min_size=1,
        ),
        min_size=1,
    )
)
def test_query_lists(items: list[str]) -> None:
    joined = parse_query([("targets", ",".join(items))], ExplainOptions)
    repeated = parse_query([("targets", item) for item in items], ExplainOptions)
    assert joined == repeated == {"targets": items}


def test_which_options_are_lists() -> None:
    assert list_options(ExplainOptions) == {
        "labels",
        "methods",
        "targets",
        "layers",
        "outputs",
        "faithfulness",
        "interventions",
    }


# ---------------------------------------------------------------- models


def infos(*versions: str, name: str = "m") -> list[Any]:
    spec = {"name": name, "source": "timm:resnet10t"}
    return [fake_info(ModelSpec(**spec, version=version)) for version in versions]


def settings(*names: str) -> Settings:
    return Settings(models=[{"name": name, "source": "timm:resnet10t"} for name in names])


def test_newest_version_by_number() -> None:
    found = find_model("m", infos("2", "10", "9"), settings("m"))
    assert found.card.version == "10"
    assert find_model("m", infos("1.9", "1.10", "1.b"), settings("m")).card.version == "1.10"


def test_ready_versions_come_first() -> None:
    old, new = infos("1", "2")
    new = structs.replace(new, card=structs.replace(new.card, ready=False, state="loading"))
    assert choose_model("m", [old, new], settings("m")).card.version == "1"
    with pytest.raises(NotReady, match="not ready yet"):
        choose_model("m@2", [old, new], settings("m"))


def test_default_model() -> None:
    known = [*infos("1", name="a"), *infos("1", name="b")]
    assert choose_model(None, known, settings("b", "a")).card.name == "b"


@pytest.mark.parametrize("reference", ["x", "m@2", "@", "@1", "m@1@1"])
def test_unknown_models(reference: str) -> None:
    with pytest.raises(UnknownModel, match="Known: m"):
        find_model(reference, infos("1"), settings("m"))


def test_a_configured_model_that_has_not_reported_is_not_ready() -> None:
    with pytest.raises(NotReady):
        find_model("b", infos("1", name="a"), settings("a", "b"))


# ---------------------------------------------------------------- timeouts


@pytest.mark.parametrize(
    ("option", "header", "seconds"),
    [(None, None, 30), (5, None, 5), (None, "1500", 1.5), (5, "1500", 5), (9999, None, 300)],
)
def test_timeout(option: float | None, header: str | None, seconds: float) -> None:
    options = PredictOptions(timeout_s=option)
    assert timeout_s(options, header, LimitSettings()) == seconds
