"""What comes back: images, arrays, errors, and how they look in a notebook."""

import io

import numpy as np
import pytest
from PIL import Image

from heatlens import APIError
from service.api.options import ExplainOptions, FeaturesOptions, PredictOptions
from service.api.schemas import ExplanationResponse, PredictResponse

pytestmark = pytest.mark.anyio


async def test_an_explanation_carries_images_and_values(client, png):
    response = await client.explain(png, outputs=["heatmap", "overlay", "values"])
    explanation = response.explanation
    assert explanation.overlay.size == (32, 32)
    assert explanation.heatmap.convert("RGBA").getextrema()[3][1] > 0
    assert explanation.values.dtype == np.float32
    assert explanation.values.min() == pytest.approx(explanation.range.min)
    assert explanation.values.max() == pytest.approx(explanation.range.max)
    assert response.top1 == response.predictions[0]
    assert response.top1.probability >= response.predictions[1].probability


async def test_every_kind_of_image_gives_the_same_scores(client, image, png, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png)
    kinds = [png, path, str(path), image, np.asarray(image)]
    scores = [(await client.predict(kind)).top1.score for kind in kinds]
    assert len(set(scores)) == 1


async def test_several_images_come_back_in_order(client, png, image):
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    both = await client.predict(png, mirrored)
    alone = await client.predict(mirrored)
    assert both.results[1].predictions == alone.predictions


async def test_one_bad_image_does_not_hide_the_others(client, png):
    response = await client.explain(b"no image", png)
    assert response.results[0].error.code == "unsupported_media_type"
    assert response.results[1].explanations
    with pytest.raises(APIError, match="format"):
        _ = response.explanation


async def test_an_error_names_code_option_and_request(client, png):
    with pytest.raises(APIError) as caught:
        await client.explain(png, methods=["nope"])
    assert caught.value.code == "invalid_option"
    assert caught.value.field == "methods.0"
    assert caught.value.status == 422
    assert caught.value.request_id
    assert "gradcam" in str(caught.value)


async def test_features_describe_layers(client, png):
    response = await client.features(png, layers=["head.conv"], grid=True)
    (statistics,) = response.features
    assert statistics.layer == "head.conv"
    assert statistics.grid.width > 1


async def test_models_layers_and_labels(client):
    (card,) = await client.models()
    assert card.ready
    layers = await client.layers(card.name)
    assert [layer.name for layer in layers if layer.recommended] == [card.target_layer]
    assert len(await client.labels(card.name)) == card.num_classes


async def test_a_result_shows_itself_in_a_notebook(client, png):
    response = await client.explain(png)
    shown = response._repr_html_()
    assert response.top1.label in shown
    assert shown.count("<img") == 1
    assert Image.open(io.BytesIO(response.explanation._repr_png_())).size == (32, 32)


async def test_labels_are_escaped_in_a_notebook(client, png):
    response = await client.explain(png)
    evil = (
        response.results[0]
        .predictions[0]
        .__class__(class_id=0, label="<script>", score=1.0, probability=0.5)
    )
    result = response.results[0].__class__(predictions=[evil])
    assert "<script>" not in result._repr_html_()


async def test_what_cannot_be_an_image_is_a_type_error(client):
    with pytest.raises(TypeError, match="int"):
        await client.predict(3)
    with pytest.raises(ValueError, match="uint8"):
        await client.predict(np.zeros((4, 4)))


def test_the_client_knows_every_option_of_the_service():
    from heatlens import options

    for theirs in (PredictOptions, ExplainOptions, FeaturesOptions):
        ours = getattr(options, theirs.__name__)
        # `on_partial` asks for partial maps.
        assert set(ours.__annotations__) == set(theirs.model_fields) - {"partial_maps"}


def test_the_client_knows_every_field_of_a_response():
    from heatlens import results

    assert set(ExplanationResponse.__struct_fields__) == set(results.Explanation.__struct_fields__)
    assert set(PredictResponse.__struct_fields__) == set(results.PredictResponse.__struct_fields__)
