"""A pool without devices: deterministic answers from the input itself, and faults on demand. For tests of the API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
from msgspec import UNSET

from models.catalog import ModelSpec, default_spec
from models.errors import Draining, HeatlensError, UnknownModel
from models.methods import METHODS
from models.types import (
    ChannelStatistics,
    ClassRef,
    ClassScore,
    Curve,
    Explanation,
    Faithfulness,
    Job,
    LayerFeatures,
    LayerInfo,
    MethodSupport,
    ModelCard,
    ModelInfo,
    Outcome,
    Preprocess,
    Progress,
    Quantiles,
)
from service.devices.messages import Completion, JobProgress, Submission
from service.devices.model_state import merge
from service.devices.pool import DeviceStatus, OnProgress, ignore

LABELS = ("tabby", "tiger cat", "golden retriever", "goldfish", "Egyptian cat")
LAYERS = ("stem", "body", "head.conv")

CURVE = Curve(share=(0.0, 0.5, 1.0), value=(0.6, 0.1, 0.0), random=(0.6, 0.4, 0.0))

Fault = Callable[[Job], HeatlensError | None]


def fake_info(
    spec: ModelSpec | None = None, *, labels: Sequence[str] = LABELS, size: int = 32
) -> ModelInfo:
    """What a small, ready model would be known by."""
    spec = spec or default_spec()
    layers = [
        LayerInfo(
            name=name,
            type="Conv2d",
            output_shape=(8, 7, 7),
            spatial=True,
            parameters=100,
            recommended=name == LAYERS[-1],
        )
        for name in LAYERS
    ]
    pool = LayerInfo(
        name="pool",
        type="Flatten",
        output_shape=(8,),
        spatial=False,
        parameters=0,
        reason="its output is not a map of the image",
    )
    return ModelInfo(
        card=ModelCard(
            name=spec.name,
            version=spec.version,
            state="ready",
            ready=True,
            source=spec.source,
            devices=("cpu",),
            versions=(spec.version,),
            num_classes=len(labels),
            input=Preprocess(resize=size + 4, crop=(size, size)),
            target_layer=LAYERS[-1],
            head="gap_linear",
            closed_form=True,
            methods=tuple(MethodSupport(name=name, applicable=True) for name in METHODS),
            best_batch=4,
            latency_ms={1: 2.0, 4: 6.0},
        ),
        labels=tuple(labels),
        layers=(*layers, pool),
        feature_layers=LAYERS,
    )


class FakePool:
    """Answers each job from its own input: brighter places are the explanation.

    Args:
        infos: the models; None = one like the default.
        delay_s: time that each job takes.
        fault: asked for each job; an error it returns ends the job.

    Attributes:
        submissions: every submission, in order of arrival.
        submitted: their jobs.
        arrived: set when the first job arrives.
        cancelled: ids of jobs that were cancelled while they ran.
        statuses: what `devices` says; may be replaced.
        infos: what `models` says; may be replaced.
    """

    def __init__(
        self,
        infos: Sequence[ModelInfo] | None = None,
        *,
        delay_s: float = 0.0,
        fault: Fault | None = None,
    ) -> None:
        self.infos = list(infos) if infos is not None else [fake_info()]
        names = tuple(f"{info.card.name}@{info.card.version}" for info in self.infos)
        self.statuses = [DeviceStatus(device="cpu", state="ready", last_pass_s=0.1, models=names)]
        self.delay_s = delay_s
        self.fault = fault
        self.submissions: list[Submission] = []
        self.arrived = asyncio.Event()
        self.cancelled: list[str] = []
        self._open = False

    async def start(self) -> None:
        """Open."""
        self._open = True

    async def close(self) -> None:
        """Refuse what comes after."""
        self._open = False

    @property
    def submitted(self) -> list[Job]:
        return [submission.job for submission in self.submissions]

    async def submit(
        self, submission: Submission, *, on_progress: OnProgress = ignore
    ) -> Completion:
        """Answer a job after the delay, or end it by the fault; tells what it is asked for."""
        if not self._open:
            raise Draining("The service is stopping.")
        job = submission.job
        info = self._info(job.model, job.version)
        self.submissions.append(submission)
        self.arrived.set()
        try:
            if submission.news != "none" and submission.price.long:
                on_progress(news_of(submission, answer(job, info)))
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled.append(job.id)
            raise
        error = self.fault(job) if self.fault else None
        if error is not None:
            raise error
        return answer(job, info)

    def models(self) -> Sequence[ModelInfo]:
        """What `infos` says, merged as the real pools merge it."""
        return merge({"cpu": self.infos}, connected={"cpu"}, coming={"cpu"})

    def devices(self) -> Sequence[DeviceStatus]:
        """What `statuses` says."""
        return self.statuses

    async def load(self, spec: ModelSpec) -> None:
        """Add or replace a model version."""
        self.infos = [*self._without(spec.name, spec.version), fake_info(spec)]

    async def unload(self, name: str, version: str | None = None) -> None:
        """Drop a model, or one version of it."""
        left = self._without(name, version)
        if len(left) == len(self.infos):
            raise UnknownModel("There is no such model.", field="model")
        self.infos = left

    def _without(self, name: str, version: str | None) -> list[ModelInfo]:
        return [
            info
            for info in self.infos
            if info.card.name != name or version not in (None, info.card.version)
        ]

    def _info(self, name: str, version: str) -> ModelInfo:
        for info in self.infos:
            if (info.card.name, info.card.version) == (name, version):
                return info
        raise UnknownModel("There is no such model.")


def news_of(submission: Submission, completion: Completion) -> JobProgress:
    """What a job says while it runs: a quarter is done, and the maps are those of the result."""
    wants_maps = submission.news == "maps"
    explanations = completion.outcome.explanations if wants_maps else ()
    method = submission.job.options.methods[0]
    progress = Progress(what=method, done=1000, total=4000, explanations=explanations)
    return JobProgress(job_id=submission.job.id, progress=progress, seconds_left=30.0)


def answer(job: Job, info: ModelInfo) -> Completion:
    """The outcome that follows from a job alone."""
    scores = fake_scores(rows_of(job), info.card.num_classes)
    ranked = sorted(scores, key=lambda score: -score.score)
    explained = [_class(target.cls, ranked) for target in job.options.targets]
    options = job.options
    layers = options.layers if options.fuse == "none" else ("+".join(options.layers),)
    outcome = Outcome(
        id=job.id,
        predictions=tuple(ranked[: options.top_k]),
        explanations=tuple(
            _explanation(job, method=method, layer=layer, target=target)
            for method in options.methods
            for target in explained
            for layer in layers
        ),
        statistics=tuple(_statistics(job, explained)) if options.statistics else (),
    )
    return Completion(outcome=outcome, queue_ms=0.5, device_ms=2.0, batch_size=4, device="cpu")


def rows_of(job: Job) -> np.ndarray:
    """The input with its channels last."""
    return job.input if job.input.dtype == np.uint8 else np.moveaxis(job.input, 0, -1)


def fake_scores(model_input: np.ndarray, classes: int) -> list[ClassScore]:
    """Scores by class: the mean brightness of one of `classes` stripes of the input."""
    stripes = np.array_split(model_input.astype(np.float64), classes)
    logits = np.array([stripe.mean() / 16 for stripe in stripes])
    powers = np.exp(logits - logits.max())
    return [
        ClassScore(class_id=i, score=float(logit), probability=float(p))
        for i, (logit, p) in enumerate(zip(logits, powers / powers.sum(), strict=True))
    ]


def fake_map(model_input: np.ndarray) -> np.ndarray:
    """A 7 by 7 map of the input's brightness above its mean, float32."""
    height, width = model_input.shape[0] // 7 * 7, model_input.shape[1] // 7 * 7
    grey = model_input[:height, :width].astype(np.float32).mean(axis=2)
    cells = grey.reshape(7, height // 7, 7, width // 7).mean(axis=(1, 3))
    cells = np.maximum(cells - cells.mean(), 0)
    return np.ascontiguousarray(cells, dtype=np.float32)


def _class(ref: ClassRef, ranked: Sequence[ClassScore]) -> ClassScore:
    if ref.kind == "rank":
        return ranked[ref.value - 1]
    return next(score for score in ranked if score.class_id == ref.value)


def _explanation(job: Job, *, method: str, layer: str, target: ClassScore) -> Explanation:
    values = fake_map(rows_of(job)) * (1 + target.class_id)
    return Explanation(
        method=method,
        layer=layer,
        target=target,
        map=values,
        signed=METHODS[method].signed,
        degenerate=not values.any(),
        faithfulness={
            name: Faithfulness(value=0.1, random=0.3, curve=CURVE if job.options.curves else UNSET)
            for name in job.options.faithfulness
        },
    )


def _statistics(job: Job, explained: Sequence[ClassScore]) -> list[LayerFeatures]:
    found = []
    for layer in job.options.layers:
        for kind in job.options.kinds:
            targets = [t.class_id for t in explained] if kind.startswith("grad_") else [None]
            found += [_layer(job, layer, kind=kind, target=target) for target in targets]
    return found


def _layer(job: Job, layer: str, *, kind: str, target: int | None) -> LayerFeatures:
    values = fake_map(rows_of(job))
    p01, p25, p50, p75, p99 = np.quantile(values, (0.01, 0.25, 0.5, 0.75, 0.99)).tolist()
    top = min(job.options.channels, 8)
    return LayerFeatures(
        layer=layer,
        kind=kind,  # type: ignore[arg-type] # comes from a job's own kinds
        shape=(8, 7, 7),
        mean=float(values.mean()),
        std=float(values.std()),
        min=float(values.min()),
        max=float(values.max()),
        l2=float(np.linalg.norm(values)),
        sparsity=float((values == 0).mean()),
        dead_channels=0,
        quantiles=Quantiles(p01=p01, p25=p25, p50=p50, p75=p75, p99=p99),
        top_channels=tuple(
            ChannelStatistics(index=i, mean=float(values.mean()), max=float(values.max()))
            for i in range(top)
        ),
        target=UNSET if target is None else target,
        grid=np.repeat(values[None], top, axis=0) if job.options.grid else None,
    )
