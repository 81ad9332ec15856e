"""Plans: a request body whose options are resolved against one model, ready to run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import msgspec

from models.areas import Area, areas_of
from models.catalog import ModelSpec
from models.errors import InvalidOption, NotReady, UnknownLayer, UnknownModel
from models.imaging.render import OverlayFormat
from models.imaging.style import ClipChoice, ColormapChoice
from models.methods import METHODS
from models.price import Price
from models.resolve import (
    check_cam,
    resolve_layers,
    resolve_methods,
    resolve_targets,
    with_labels,
)
from models.types import (
    ClassRef,
    Intervention,
    JobOptions,
    ModelCard,
    ModelInfo,
    Operation,
    Struct,
    Target,
)
from service.api.body import ImageInput
from service.api.budget import answer_bytes, check_budget, price_of
from service.api.options import (
    MAX_AGAINST,
    MAX_MASKS,
    AnyOptions,
    CanvasName,
    CompareOptions,
    ExplainOptions,
    FeaturesOptions,
    InterventionOption,
    MapOptions,
    Output,
    PredictOptions,
    count_against,
)
from service.settings import LimitSettings, Settings

_UNREADY = {"unavailable": "could not be loaded", "unloading": "is being unloaded"}


class RenderOptions(Struct):
    """Options of drawing maps."""

    outputs: tuple[Output, ...] = ("heatmap", "overlay")
    canvas: CanvasName = "input"
    colormap: ColormapChoice = "auto"
    clip: ClipChoice = "auto"
    alpha: float = 0.5
    overlay_format: OverlayFormat = "jpeg"
    partial_maps: bool = False


class PlannedImage(Struct):
    """One image with the options of its job, and the areas that its targets name."""

    input: ImageInput
    options: JobOptions
    price: Price
    areas: tuple[Area, ...] = ()


class Plan(Struct):
    """A resolved request.

    Attributes:
        info: the model that runs it.
        started: monotonic time at which the request arrived.
        deadline: monotonic time by which it is answered or failed.
        encoding_ms: time to encode its labels, which is part of its first image's price.
    """

    operation: Operation
    info: ModelInfo
    images: tuple[PlannedImage, ...]
    render: RenderOptions
    started: float
    deadline: float
    encoding_ms: float = 0.0

    @property
    def is_long(self) -> bool:
        """Whether it has a job that takes steps between those of others."""
        return any(image.price.long for image in self.images)

    def patience_s(self, max_wait_s: float) -> float:
        """The longest wait with which it is accepted; see `Price.patience_s`."""
        return max(image.price.patience_s(max_wait_s) for image in self.images)

    @property
    def device_ms(self) -> float:
        """Estimated time of all its jobs on a device."""
        return sum(image.price.device_ms for image in self.images)

    @property
    def answer_bytes(self) -> int:
        """Estimated size of the answer, or of the results that it is made from."""
        return sum(answer_bytes(self, image.price, self.render) for image in self.images)


def find_model(reference: str, infos: Sequence[ModelInfo], settings: Settings) -> ModelInfo:
    """Find `name` (its newest ready version) or `name@version`, ready or not.

    Raises:
        UnknownModel: no such model is configured.
        NotReady: it is configured, but nothing is known about it yet.
    """
    found = [info for info in infos if names(reference, info.card)]
    if found:
        return max(found, key=lambda info: (info.card.ready, _natural(info.card.version)))
    if any(names(reference, spec) for spec in settings.models):
        raise NotReady("The model is not loaded yet.", field="model")
    known = ", ".join(dict.fromkeys(info.card.name for info in infos))
    raise UnknownModel(f"There is no such model. Known: {known}.", field="model")


def names(reference: str, model: ModelCard | ModelSpec) -> bool:
    """Whether `name` or `name@version` names a model version."""
    name, _, version = reference.partition("@")
    return model.name == name and version in ("", model.version)


def choose_model(
    reference: str | None, infos: Sequence[ModelInfo], settings: Settings
) -> ModelInfo:
    """Find the model that a request names, or the default one, if it is ready.

    Raises:
        UnknownModel: no such model is configured.
        NotReady: it is not warm, or could not be loaded.
    """
    info = find_model(reference or settings.default_model, infos, settings)
    if not info.card.ready:
        text = _UNREADY.get(info.card.state, "is not ready yet")
        raise NotReady(f"The model {text}; see GET /v1/models/{info.card.name}.", field="model")
    return info


def timeout_s(options: AnyOptions, header: str | None, limits: LimitSettings) -> float:
    """Seconds that a request may take, capped: its option, its header (in ms) or the default.

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
    encodes: bool = True,
) -> Plan:
    """Resolve labels, ranks, layers and methods against the model, and price the request.

    `encodes` says whether labels that it brings must be encoded.

    Raises:
        HeatlensError: an option does not fit the model, or costs too much; the error names it.
    """
    check_task(options.operation, info, images=len(images))
    labels = getattr(options, "labels", [])
    if options.operation != "compare":
        info = with_labels(info, labels)
    takes = info.card.texts if encodes else None
    encoding_ms = 0.0 if takes is None else takes.encoding_ms(labels)
    common = job_options(options, info)
    planned, usual = [], price_of(options.operation, common, info)
    common_targets = getattr(options, "targets", [])
    _check_contrasts([image.targets or [] for image in images])
    for i, image in enumerate(images):
        resolved, cost = common, usual
        if image.targets is not None:
            targets = resolve_targets(image.targets, info, field=f"images.{i}.targets")
            # A prediction has no targets; they are only checked.
            if common.targets:
                resolved = msgspec.structs.replace(common, targets=targets)
                cost = price_of(options.operation, resolved, info)
        raw = image.targets if image.targets is not None else common_targets
        areas = areas_of(raw) if resolved.targets else ()
        if encoding_ms:
            # The first image's job encodes them for all; until then all wait between steps.
            own_ms = cost.device_ms + (encoding_ms if i == 0 else 0.0)
            cost = msgspec.structs.replace(cost, device_ms=own_ms, long=True)
        planned.append(PlannedImage(input=image, options=resolved, price=cost, areas=areas))
    if sum(area.mask is not None for image in planned for area in image.areas) > MAX_MASKS:
        raise InvalidOption(
            f"The targets of all images have at most {MAX_MASKS} masks together.", field="targets"
        )
    results = sum(_count(options.operation, image.options) for image in planned)
    if results > limits.max_results:
        raise InvalidOption(
            f"The request asks for {results} results, at most {limits.max_results} are allowed."
        )
    plan = Plan(
        operation=options.operation,
        info=info,
        images=tuple(planned),
        render=render_options(options),
        started=started,
        deadline=deadline,
        encoding_ms=encoding_ms,
    )
    check_budget(plan, limits)
    return plan


def check_task(operation: Operation, info: ModelInfo, *, images: int) -> None:
    """Refuse an operation that has no meaning for what the model was trained to do.

    Raises:
        InvalidOption: it has none, or two images are needed.
    """
    name, gives_vectors = info.card.name, info.card.task == "embedding"
    if gives_vectors and operation in ("predict", "explain"):
        raise InvalidOption(
            f"{name} gives vectors, not classes: POST /v1/compare compares two images.",
            field="model",
        )
    if operation != "compare":
        return
    if not gives_vectors:
        raise InvalidOption(
            f'{name} gives scores of classes; models of the task "embedding" compare images.',
            field="model",
        )
    if images != 2:
        raise InvalidOption("Exactly two images are compared.", field="images")


def job_options(options: AnyOptions, info: ModelInfo) -> JobOptions:
    """The options of a job, resolved against the model.

    Raises:
        HeatlensError: an option does not fit the model; the error names it.
    """
    changes = _interventions(options.interventions, info)
    classes = max(1, info.card.num_classes)
    if isinstance(options, PredictOptions):
        return JobOptions(
            labels=tuple(options.labels),
            top_k=min(options.top_k, classes),
            targets=(),
            layers=resolve_layers(["auto"], info, spatial=True) if options.statistics else (),
            statistics=options.statistics,
            interventions=changes,
        )
    if isinstance(options, CompareOptions):
        return _map_options(options, info, changes)
    targets = _targets(options, info)
    if isinstance(options, FeaturesOptions):
        return JobOptions(
            labels=tuple(options.labels),
            top_k=min(5, classes),
            targets=targets,
            layers=resolve_layers(options.layers, info, spatial=False),
            statistics=True,
            kinds=tuple(dict.fromkeys(options.kinds)),
            channels=options.channels,
            grid=options.grid,
            interventions=changes,
        )
    return msgspec.structs.replace(
        _map_options(options, info, changes),
        labels=tuple(options.labels),
        top_k=min(options.top_k, classes),
        targets=targets,
        statistics=options.statistics,
        faithfulness=tuple(dict.fromkeys(options.faithfulness)),
        curves=options.curves,
    )


def _map_options(
    options: MapOptions, info: ModelInfo, changes: tuple[Intervention, ...]
) -> JobOptions:
    """Options of a job that makes maps of the one score that a similarity is."""
    methods = resolve_methods(options.methods, info)
    layers = _explained_layers(options.layers, methods, info)
    check_cam(methods, layers, info)
    return JobOptions(
        targets=(Target(cls=ClassRef(kind="index", value=0)),),
        methods=methods,
        layers=layers,
        fuse=options.fuse,
        interventions=changes,
        samples=options.samples,
        steps=options.steps,
        seed=options.seed,
    )


def _targets(options: ExplainOptions | FeaturesOptions, info: ModelInfo) -> tuple[Target, ...]:
    """The targets; none for the features of a model without classes."""
    if info.card.task != "embedding":
        return resolve_targets(options.targets, info)
    if isinstance(options, FeaturesOptions) and any(k.startswith("grad") for k in options.kinds):
        reason = f"{info.card.name} gives vectors: there is no score to differentiate."
        raise InvalidOption(reason, field="kinds")
    return ()


def _explained_layers(
    wanted: Sequence[str], methods: Sequence[str], info: ModelInfo
) -> tuple[str, ...]:
    """The layers to explain; none where the model recommends none and the methods need none."""
    needs_none = all(METHODS[name].of_input for name in methods)
    if info.card.target_layer is None and list(wanted) == ["auto"] and needs_none:
        return ()
    return resolve_layers(wanted, info, spatial=True)


def render_options(options: AnyOptions) -> RenderOptions:
    """The options by which maps are drawn, with defaults for those that the request cannot have."""
    return msgspec.convert(options, RenderOptions, from_attributes=True)


def _interventions(
    wanted: Sequence[InterventionOption], info: ModelInfo
) -> tuple[Intervention, ...]:
    for i, item in enumerate(wanted):
        field = f"interventions.{i}.layer"
        if item.layer not in info.places:
            path = f"/v1/models/{info.card.name}/layers"
            raise UnknownLayer(f"No layer has this name; GET {path} lists them.", field=field)
        layer = info.layers[info.places[item.layer]]
        if not layer.usable:
            raise UnknownLayer(f"{layer.name} cannot be changed: {layer.reason}.", field=field)
    return tuple(
        Intervention(**{**dict(item), "channels": tuple(dict.fromkeys(item.channels))})
        for item in wanted
    )


def _check_contrasts(targets: Sequence[Sequence[object]]) -> None:
    """Bound the classes of all contrasts together, before they are looked up."""
    if sum(map(count_against, targets)) > MAX_AGAINST:
        raise InvalidOption(
            f"The contrasts of all images have at most {MAX_AGAINST} classes together.",
            field="images",
        )


def _count(operation: Operation, options: JobOptions) -> int:
    """Maximum number of explanations or statistics in the result of one image."""
    if operation in ("explain", "compare"):
        layers = max(1, len(options.layers)) if options.fuse == "none" else 1
        return len(options.methods) * len(options.targets) * layers
    gradients = sum(kind.startswith("grad_") for kind in options.kinds)
    per_layer = len(options.kinds) - gradients + gradients * len(options.targets)
    return len(options.layers) * per_layer


@lru_cache
def _natural(version: str) -> Sequence[tuple[int, int | str]]:
    """A sort key: version 10 comes after version 9."""
    parts = re.findall(r"[0-9]+|[A-Za-z]+|[^0-9A-Za-z]+", version)
    return [(1, int(part)) if part.isdecimal() else (0, part) for part in parts]
