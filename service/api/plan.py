"""From a submission to a plan: options resolved against one model, ready to run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from models.errors import InvalidOption, NotReady, UnknownLayer, UnknownModel
from models.imaging.render import OverlayFormat
from models.imaging.style import ClipChoice, ColormapChoice
from models.resolve import resolve_layers, resolve_methods, resolve_targets
from models.types import Intervention, JobOptions, ModelInfo, Operation, Struct, Target
from service.api.body import ImageInput
from service.api.options import (
    AnyOptions,
    CanvasName,
    ExplainOptions,
    FeaturesOptions,
    InterventionOption,
    Output,
    PredictOptions,
)
from service.settings import LimitSettings, Settings

_UNREADY = {"unavailable": "could not be loaded", "unloading": "is being unloaded"}


class RenderOptions(Struct):
    """How maps become pictures."""

    outputs: tuple[Output, ...] = ("heatmap", "overlay")
    canvas: CanvasName = "input"
    colormap: ColormapChoice = "auto"
    clip: ClipChoice = "auto"
    alpha: float = 0.5
    overlay_format: OverlayFormat = "jpeg"


class PlannedImage(Struct):
    """One image and what is asked of it."""

    input: ImageInput
    options: JobOptions


class Plan(Struct):
    """A request, resolved.

    Attributes:
        info: the model that answers.
        started: monotonic time at which the request arrived.
        deadline: monotonic time by which it is answered or failed.
    """

    operation: Operation
    info: ModelInfo
    images: tuple[PlannedImage, ...]
    render: RenderOptions
    started: float
    deadline: float


def find_model(reference: str, infos: Sequence[ModelInfo], settings: Settings) -> ModelInfo:
    """Find `name` (its newest ready version) or `name@version`, ready or not.

    Raises:
        UnknownModel: none of that name is configured.
        NotReady: it is configured, but nothing is known of it yet.
    """
    name, _, version = reference.partition("@")
    found = [
        info
        for info in infos
        if info.card.name == name and (not version or info.card.version == version)
    ]
    if found:
        return max(found, key=lambda info: (info.card.ready, _natural(info.card.version)))
    if any(s.name == name and (not version or s.version == version) for s in settings.models):
        raise NotReady("The model is not loaded yet.", field="model")
    known = ", ".join(dict.fromkeys(info.card.name for info in infos))
    raise UnknownModel(f"There is no such model. Known: {known}.", field="model")


def choose_model(
    reference: str | None, infos: Sequence[ModelInfo], settings: Settings
) -> ModelInfo:
    """Find the model that a request names, or the default one, ready to answer.

    Raises:
        UnknownModel: none of that name is configured.
        NotReady: it is not warm, or could not be loaded.
    """
    info = find_model(reference or settings.default_model, infos, settings)
    if not info.card.ready:
        text = _UNREADY.get(info.card.state, "is not ready yet")
        raise NotReady(
            f"The model {text}; GET /v1/models/{info.card.name} says more.", field="model"
        )
    return info


def timeout_s(options: AnyOptions, header: str | None, limits: LimitSettings) -> float:
    """Seconds that a request may take: its option, else its header (milliseconds), else the default; capped.

    Raises:
        InvalidOption: the header is not a positive number.
    """
    seconds = options.timeout_s
    if seconds is None and header is not None:
        if not re.fullmatch(r"[0-9]{1,12}", header) or int(header) == 0:
            raise InvalidOption(
                "Must be a positive whole number of milliseconds.", field="X-Request-Timeout-Ms"
            )
        seconds = int(header) / 1000
    return min(limits.timeout_s if seconds is None else seconds, limits.max_timeout_s)


def make_plan(
    images: Sequence[ImageInput],
    options: AnyOptions,
    info: ModelInfo,
    *,
    limits: LimitSettings,
    started: float,
    deadline: float,
) -> Plan:
    """Resolve labels, ranks, layers and methods against the model.

    Raises:
        HeatlensError: what does not fit the model, naming the option.
    """
    common = job_options(options, info)
    planned = []
    for i, image in enumerate(images):
        its = common
        if image.targets is not None:
            targets = resolve_targets(image.targets, info, field=f"images.{i}.targets")
            its = _with_targets(options, common, targets)
        planned.append(PlannedImage(input=image, options=its))
    results = sum(_count(options.operation, image.options) for image in planned)
    if results > limits.max_results:
        raise InvalidOption(
            f"The request asks for {results} results, at most {limits.max_results} are allowed."
        )
    return Plan(
        operation=options.operation,
        info=info,
        images=tuple(planned),
        render=render_options(options),
        started=started,
        deadline=deadline,
    )


def job_options(options: AnyOptions, info: ModelInfo) -> JobOptions:
    """What a job asks of the device.

    Raises:
        HeatlensError: what does not fit the model, naming the option.
    """
    changes = _interventions(options.interventions, info)
    classes = max(1, info.card.num_classes)
    if isinstance(options, PredictOptions):
        layers = resolve_layers(["auto"], info, spatial=True) if options.statistics else ()
        return JobOptions(
            top_k=min(options.top_k, classes),
            targets=(),
            layers=layers,
            statistics=options.statistics,
            interventions=changes,
        )
    targets = resolve_targets(options.targets, info)
    if isinstance(options, FeaturesOptions):
        return JobOptions(
            top_k=min(5, classes),
            targets=targets,
            layers=resolve_layers(options.layers, info, spatial=False),
            statistics=True,
            kinds=tuple(dict.fromkeys(options.kinds)),
            channels=options.channels,
            grid=options.grid,
            interventions=changes,
        )
    return JobOptions(
        top_k=min(options.top_k, classes),
        targets=targets,
        methods=resolve_methods(options.methods, info),
        layers=resolve_layers(options.layers, info, spatial=True),
        fuse=options.fuse,
        statistics=options.statistics,
        interventions=changes,
        faithfulness=tuple(dict.fromkeys(options.faithfulness)),
        samples=options.samples,
        steps=options.steps,
        seed=options.seed,
    )


def render_options(options: AnyOptions) -> RenderOptions:
    """How the answer's pictures are drawn."""
    if isinstance(options, ExplainOptions):
        return RenderOptions(
            outputs=tuple(dict.fromkeys(options.outputs)),
            canvas=options.canvas,
            colormap=options.colormap,
            clip=options.clip,
            alpha=options.alpha,
            overlay_format=options.overlay_format,
        )
    if isinstance(options, FeaturesOptions):
        return RenderOptions(colormap=options.colormap)
    return RenderOptions()


def _with_targets(
    options: AnyOptions, common: JobOptions, targets: tuple[Target, ...]
) -> JobOptions:
    if isinstance(options, PredictOptions):
        return common  # predictions have no targets
    values: dict[str, Any] = {name: getattr(common, name) for name in common.__struct_fields__}
    return JobOptions(**{**values, "targets": targets})


def _interventions(
    wanted: Sequence[InterventionOption], info: ModelInfo
) -> tuple[Intervention, ...]:
    layers = {layer.name for layer in info.layers}
    for i, item in enumerate(wanted):
        if item.layer not in layers:
            raise UnknownLayer(
                f"No layer has this name; GET /v1/models/{info.card.name}/layers lists them.",
                field=f"interventions.{i}.layer",
            )
    return tuple(
        Intervention(layer=item.layer, channels=tuple(item.channels), op=item.op, value=item.value)
        for item in wanted
    )


def _count(operation: Operation, options: JobOptions) -> int:
    """Explanations, or statistics, that one image's answer holds at most."""
    if operation == "explain":
        layers = len(options.layers) if options.fuse == "none" else 1
        return len(options.methods) * len(options.targets) * layers
    gradients = sum(kind.startswith("grad_") for kind in options.kinds)
    per_layer = len(options.kinds) - gradients + gradients * len(options.targets)
    return len(options.layers) * per_layer


def _natural(version: str) -> list[tuple[int, int | str]]:
    """Sort key by which version 10 comes after version 9."""
    parts = re.findall(r"[0-9]+|[A-Za-z]+|[^0-9A-Za-z]+", version)
    return [(1, int(part)) if part.isdecimal() else (0, part) for part in parts]
