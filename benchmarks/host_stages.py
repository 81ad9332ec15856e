"""The stages of an answer as the service does them, beside the libraries' own calls for the same bytes."""

from __future__ import annotations

import base64
import io
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image
from python_multipart.multipart import MultipartParser

from benchmarks.peers.cases import BOUNDARY, multipart
from benchmarks.photographs import answer, engine_of
from benchmarks.timing import Case
from models.catalog import default_spec
from models.imaging.decode import DecodeLimits, decode, inspect
from models.imaging.locate import locate
from models.imaging.prepare import PreparedImage, prepare
from models.imaging.preprocess import preprocess
from models.imaging.render import heatmap_png, input_canvas, overlay, quantise, shade
from models.imaging.style import style_of
from models.registry import ModelRegistry
from models.types import Job, ModelInfo, Outcome, Preprocess
from service.api.body import ImageInput
from service.api.json import validate
from service.api.multipart import read_form
from service.api.options import ExplainOptions
from service.api.plan import Plan, make_plan
from service.api.responses import render
from service.api.schemas import ExplainResult
from service.devices.messages import Completion, FromWorker, Results, Submission, ToWorker
from service.devices.messages import decode as read_message
from service.devices.messages import encode as make_message
from service.settings import LimitSettings

_LIMITS = DecodeLimits()
_STYLE = style_of(signed=False, of_pixels=False)
_CHUNK = 64 * 1024


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of an answer as the service does it, and the libraries' own calls for the same."""

    ours: Case
    floor: Case | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture with all that is made of it on its way through the service."""

    data: bytes
    form: bytes
    plan: Plan
    source: PreparedImage
    submission: Submission
    outcome: Outcome
    result: ExplainResult


def pictures_of(images: Sequence[bytes]) -> list[Picture]:
    """Send pictures through the default model."""
    registry, spec = ModelRegistry("cpu", Path.cwd()), default_spec()
    info = registry.load(spec)
    engine = engine_of(registry.get(spec.name, spec.version))
    found = []
    for data, form in zip(images, multipart(images), strict=True):
        plan = make_default_plan(data, info)
        source = prepare(data, limits=_LIMITS, spec=_input(info), canvas="input")
        job = Job(
            id="0" * 32,
            operation="explain",
            model=spec.name,
            version=spec.version,
            input=source.input,
            options=plan.images[0].options,
        )
        outcome = answer(engine, job)
        found.append(
            Picture(
                data=data,
                form=form.body,
                plan=plan,
                source=source,
                submission=Submission(job=job, deadline=plan.deadline, price=plan.images[0].price),
                outcome=outcome,
                result=_drawn(outcome, source, plan),
            )
        )
    return found


def make_default_plan(data: bytes, info: ModelInfo) -> Plan:
    """The plan of a request without options."""
    now = time.monotonic()
    return make_plan(
        [ImageInput(data=data)],
        validate(ExplainOptions, {}),
        info,
        limits=LimitSettings(),
        started=now,
        deadline=now + 30,
    )


def stages_of(pictures: Sequence[Picture]) -> dict[str, Stage]:
    """The stages of an answer, each over all pictures."""
    info = pictures[0].plan.info
    spec = _input(info)
    datas, forms = [p.data for p in pictures], [p.form for p in pictures]
    decoded = [decode(data, limits=_LIMITS, preprocess=spec) for data in datas]
    submissions = [p.submission for p in pictures]
    answers = [Results(completions=(Completion(outcome=p.outcome),)) for p in pictures]
    canvases = [input_canvas(p.source.input) for p in pictures]
    maps = [p.outcome.explanations[0].map for p in pictures]
    levels = [quantise(shade(m, c, _STYLE)) for m, c in zip(maps, canvases, strict=True)]
    drawn = [_files(p.result) for p in pictures]

    def each(call: Callable[..., object], *arguments: Sequence[Any]) -> Case:
        def run() -> None:
            # What is kept would be written to fresh memory.
            for items in zip(*arguments, strict=True):
                call(*items)

        return run

    texts = each(
        lambda p, files: (list(map(base64.b64encode, files)), msgspec.json.encode(p.result)),
        pictures,
        drawn,
    )
    return {
        "form": Stage(each(_read_form, forms), each(_parse_form, forms)),
        "options, plan, price": Stage(each(lambda data: make_default_plan(data, info), datas)),
        "headers of the image": Stage(each(lambda data: inspect(data, limits=_LIMITS), datas)),
        "decode": Stage(
            each(lambda data: decode(data, limits=_LIMITS, preprocess=spec), datas),
            each(lambda data: Image.open(io.BytesIO(data)).load(), datas),
        ),
        "resize and crop": Stage(
            each(lambda image: preprocess(image, spec), decoded),
            each(lambda image: _resize(image.image, spec), decoded),
        ),
        "job: write": Stage(each(make_message, submissions)),
        "job: read": Stage(each(lambda f: read_message(f, ToWorker), _frames(submissions))),
        "result: write": Stage(each(make_message, answers)),
        "result: read": Stage(each(lambda f: read_message(f, FromWorker), _frames(answers))),
        "peak and box": Stage(
            each(lambda m, p: locate(m, p.source.geometry, signed=False), maps, pictures)
        ),
        "shade": Stage(each(lambda m, c: quantise(shade(m, c, _STYLE)), maps, canvases)),
        "heatmap": Stage(
            each(lambda v, c: heatmap_png(v, c, _STYLE), levels, canvases),
            each(lambda rows: zlib.compress(rows, 1), [_rows_of_png(png) for png, _ in drawn]),
        ),
        "overlay": Stage(
            each(
                lambda v, c: overlay(v, c, _STYLE, alpha=0.5, image_format="jpeg"), levels, canvases
            ),
            each(_save_jpeg, [Image.open(io.BytesIO(jpeg)).copy() for _, jpeg in drawn]),
        ),
        "base64 and JSON": Stage(texts, texts),
    }


def _input(info: ModelInfo) -> Preprocess:
    assert info.card.input is not None
    return info.card.input


def _drawn(outcome: Outcome, source: PreparedImage, plan: Plan) -> ExplainResult:
    steps = render(outcome, source, plan)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: ExplainResult = stop.value
            return result


def _files(result: ExplainResult) -> tuple[bytes, bytes]:
    """Heatmap and overlay."""
    (explanation,) = result.explanations or ()
    assert explanation.heatmap
    assert explanation.overlay
    return base64.b64decode(explanation.heatmap.data), base64.b64decode(explanation.overlay.data)


def _frames(messages: Sequence[Any]) -> list[list[bytes]]:
    return [[bytes(frame) for frame in make_message(message)] for message in messages]


def _read_form(body: bytes) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(body), _CHUNK):
            yield body[at : at + _CHUNK]

    content_type = f"multipart/form-data; boundary={BOUNDARY}"
    reading = read_form(chunks(), content_type=content_type, limits=LimitSettings())
    try:
        reading.send(None)
    except StopIteration:
        return


def _parse_form(body: bytes) -> None:
    parser = MultipartParser(BOUNDARY, {})
    for at in range(0, len(body), _CHUNK):
        parser.write(body[at : at + _CHUNK])


def _resize(image: Image.Image, spec: Preprocess) -> bytes:
    """As torchvision does it: the whole image, of which the crop is kept."""
    assert isinstance(spec.resize, int)
    scale = spec.resize / min(image.size)
    width, height = int(image.width * scale), int(image.height * scale)
    left, top = (width - spec.crop[1]) // 2, (height - spec.crop[0]) // 2
    whole = image.resize((width, height), Image.Resampling[spec.interpolation.upper()])
    return whole.crop((left, top, left + spec.crop[1], top + spec.crop[0])).tobytes()


def _rows_of_png(png: bytes) -> bytes:
    """The filtered rows of a picture, as they are compressed."""
    start = png.index(b"IDAT")
    size = int.from_bytes(png[start - 4 : start], "big")
    return zlib.decompress(png[start + 4 : start + 4 + size])


def _save_jpeg(image: Image.Image) -> None:
    image.save(io.BytesIO(), "JPEG", quality=85)
