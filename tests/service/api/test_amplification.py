"""Small requests that ask for much: refused, or made small, before anything is decoded."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.fakes import FakePool

pytestmark = pytest.mark.anyio


def contrast(classes: int) -> dict[str, Any]:
    return {"class": 0, "against": [1] * classes}


@pytest.mark.parametrize(
    ("images", "options", "field"),
    [
        (32, {"methods": ["integrated_gradients"], "steps": 1000, "timeout_s": 30}, "steps"),
        (1, {"methods": ["rise"], "samples": 10_000, "timeout_s": 5}, "samples"),
        (
            32,
            {
                "layers": ["stem", "body", "head.conv"],
                "targets": [0, 1, 2, 3, 4],
                "canvas": "original",
                "overlay_format": "png",
            },
            "canvas",
        ),
        (1, {"targets": [contrast(1000), contrast(1)]}, "targets"),
        (
            1,
            {
                "interventions": [
                    {"layer": "stem", "channels": [1], "op": "scale", "value": 1e38},
                ]
            },
            "interventions.0.value",
        ),
    ],
)
async def test_what_costs_too_much_names_its_option(
    client: httpx.AsyncClient, pool: FakePool, images: int, options: dict[str, Any], field: str
) -> None:
    # Not an image at all: the price comes first.
    body = {"images": [{"b64": "aGVsbG8="}] * images, **options}
    response = await client.post("/v1/explain", json=body)
    assert response.status_code == 422, response.text
    assert (response.json()["code"], response.json()["field"]) == ("invalid_option", field)
    assert not pool.submitted


async def test_contrasts_of_all_images_are_bounded_together(
    client: httpx.AsyncClient, b64: str
) -> None:
    images = [{"b64": b64, "targets": [contrast(600)]}, {"b64": b64, "targets": [contrast(600)]}]
    response = await client.post("/v1/explain", json={"images": images})
    assert response.status_code == 422
    assert response.json()["field"] == "images"


async def test_what_is_named_twice_counts_once(
    client: httpx.AsyncClient, pool: FakePool, b64: str
) -> None:
    change = {"layer": "stem", "channels": [3, 1] * 2000, "op": "zero"}
    body = {
        "images": [{"b64": b64}],
        "targets": ["top1", 2, "2", "top1"],
        "layers": ["stem", "ste*"],
        "methods": ["gradcam", "gradcam"],
        "interventions": [change],
    }
    response = await client.post("/v1/explain", json=body)
    assert response.status_code == 200
    options = pool.submitted[0].options
    assert [target.cls.value for target in options.targets] == [1, 2]
    assert (options.layers, options.methods) == (("stem",), ("gradcam",))
    assert options.interventions[0].channels == (3, 1)
    assert len(response.json()["results"][0]["explanations"]) == 2
