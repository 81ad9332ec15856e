"""Messages survive the wire, and frames that are not a message are refused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.errors import ERRORS, InternalError, Overloaded
from models.types import (
    ClassScore,
    Explanation,
    Failure,
    Faithfulness,
    Intervention,
    Job,
    JobOptions,
    LayerFeatures,
    ModelCard,
    ModelInfo,
    Outcome,
    Quantiles,
)
from service.devices.messages import (
    Ack,
    Cancel,
    Completion,
    FromWorker,
    Hello,
    Load,
    MalformedMessage,
    Models,
    Results,
    Submission,
    ToWorker,
    Unload,
    decode,
    encode,
    from_wire,
)

IMAGES = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=5))
MAPS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, min_side=0, max_side=5))
SCORE = ClassScore(class_id=3, score=-1.5, probability=0.25)


def plain(value: object) -> object:
    """A structure with arrays as nested lists, to compare."""
    return msgspec.to_builtins(
        value, enc_hook=lambda a: [str(a.dtype), list(a.shape), a.tobytes()], builtin_types=(bytes,)
    )


def over_the_wire(message, kinds):
    return decode([bytes(frame) for frame in encode(message)], kinds)


@given(IMAGES)
def test_jobs(pixels):
    options = JobOptions(
        methods=("gradcam",),
        layers=("layer4.1",),
        interventions=(Intervention(layer="layer1", channels=(3, 4), op="zero"),),
        seed=7,
    )
    job = Job(
        id="a",
        operation="explain",
        model="m",
        version="2",
        input=pixels,
        options=options,
    )
    submission = Submission(job=job, deadline=12.5, digest="d", worker_exits=1)
    assert plain(over_the_wire(submission, ToWorker)) == plain(submission)


@given(MAPS, st.none() | MAPS)
def test_results(array, grid):
    explanation = Explanation(
        method="gradcam",
        layer="last",
        target=SCORE,
        map=array,
        signed=False,
        degenerate=True,
        faithfulness={"deletion": Faithfulness(value=0.1, random=0.2)},
    )
    statistics = LayerFeatures(
        layer="last",
        kind="output",
        shape=(2, 3, 4),
        mean=0.0,
        std=1.0,
        min=-1.0,
        max=1.0,
        l2=2.0,
        sparsity=0.5,
        dead_channels=1,
        quantiles=Quantiles(p01=0, p25=1, p50=2, p75=3, p99=4),
        grid=grid,
    )
    outcome = Outcome(
        id="x", predictions=(SCORE,), explanations=(explanation,) * 2, statistics=(statistics,)
    )
    results = Results(
        completions=(Completion(outcome=outcome, batch_size=2),) * 2,
        failures=(Failure(id="y", code="c", message="m"),),
        others_ms=3,
    )
    assert plain(over_the_wire(results, FromWorker)) == plain(results)


@pytest.mark.parametrize(
    ("message", "kinds"),
    [
        (Hello(), ToWorker),
        (Cancel(job_id="x"), ToWorker),
        (Load(request_id="r", spec="{}"), ToWorker),
        (Unload(request_id="r", name="n"), ToWorker),
        (Ack(request_id="r", failure=Failure(id="r", code="c", message="m")), FromWorker),
        (
            Models(
                infos=(
                    ModelInfo(
                        card=ModelCard(
                            name="n",
                            version="1",
                            state="ready",
                            ready=True,
                            source="s",
                            latency_ms={1: 2.5},
                        ),
                        labels=("cat",),
                    ),
                )
            ),
            FromWorker,
        ),
    ],
)
def test_other_messages(message, kinds):
    assert over_the_wire(message, kinds) == message


def test_arrays_are_views_not_copies():
    pixels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    frames = encode(Submission(job=a_job(pixels), deadline=0))
    assert np.shares_memory(np.frombuffer(frames[1], dtype=np.uint8), pixels)
    decoded = decode(frames, ToWorker).job.input
    assert np.shares_memory(decoded, pixels)
    with pytest.raises(ValueError, match="read-only"):
        decode([bytes(frame) for frame in frames], ToWorker).job.input[0] = 1


def test_strided_arrays_keep_their_order():
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)[::2, ::-1]
    decoded = over_the_wire(Submission(job=a_job(pixels), deadline=0), ToWorker).job.input
    assert (decoded == pixels).all()


def a_job(pixels) -> Job:
    return Job(
        id="a",
        operation="predict",
        model="m",
        version="1",
        input=pixels,
        options=JobOptions(),
    )


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((1,) * 5, np.uint8), np.array([{}])])
def test_other_arrays_are_refused(array):
    with pytest.raises(TypeError):
        encode(Submission(job=a_job(array), deadline=0))


def forged(reference: object) -> list[bytes]:
    """A submission with a forged array reference."""
    header = msgspec.to_builtins(
        Submission(job=a_job(np.zeros(1, np.uint8)), deadline=0), enc_hook=lambda _: reference
    )
    return [msgspec.msgpack.encode(header), bytes(12)]


@pytest.mark.parametrize(
    "reference",
    [
        [1, "uint8", [13]],  # beyond its frame
        [1, "uint8", [11]],  # short of it
        [1, "float32", [12]],
        [1, "uint8", [-1]],
        [1, "uint8", [-3, -4]],
        [1, "uint8", [2**62, 2**62]],
        [0, "uint8", [12]],  # the header itself
        [2, "uint8", [12]],
        [-1, "uint8", [12]],
        [1, "object", [12]],
        [1, "float64", [1]],
        [1, "uint8", [1, 1, 1, 1, 12]],
        [1, "uint8", "12"],
        [1, "uint8"],
        {"frame": 1},
        "text",
        None,
    ],
)
def test_forged_references_are_refused(reference):
    assert decode(forged([1, "uint8", [3, 4]]), ToWorker).job.input.shape == (3, 4)
    with pytest.raises(MalformedMessage):
        decode(forged(reference), ToWorker)


@given(st.lists(st.binary(max_size=60), max_size=3))
def test_noise_is_refused(frames):
    for kinds in (ToWorker, FromWorker):
        with pytest.raises(MalformedMessage):
            decode(frames, kinds)


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_flipped_byte_is_a_message_or_refused(position, value):
    frames = [
        bytearray(frame)
        for frame in encode(Submission(job=a_job(np.zeros((2, 2), np.uint8)), deadline=0))
    ]
    frames[0][position % len(frames[0])] = value
    try:
        decoded = decode(frames, ToWorker)
    except MalformedMessage:
        return
    assert isinstance(decoded, Submission)
    assert decoded.job.input.nbytes <= 4


# ---------------------------------------------------------------- errors as data


@pytest.mark.parametrize("code", ERRORS)
def test_errors_survive_as_failures(code):
    error = ERRORS[code]("what", field="methods.0", retry_after_s=2.5)
    back = from_wire(Failure.of("id", error))
    assert type(back) is type(error)
    assert (back.message, back.field, back.retry_after_s) == ("what", "methods.0", 2.5)


def test_an_unknown_code_is_an_internal_error():
    assert type(from_wire(Failure(id="x", code="no_such", message="m"))) is InternalError
    assert Failure.of("x", Overloaded("m")).code == "overloaded"
