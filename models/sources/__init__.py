"""From a catalog entry to a verified, frozen model on the CPU. No torch at import."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from models.catalog import ModelSpec, PreprocessSpec
from models.errors import ModelLoadFailed
from models.labels import default_labels, read_labels
from models.types import Preprocess, Task

if TYPE_CHECKING:
    from torch import nn

    from models.texts import TextEncoder

SOURCES = {
    "torchvision": "models.sources.torchvision",
    "timm": "models.sources.timm",
    "python": "models.sources.python",
    "transformers": "models.sources.transformers",
    "export": "models.sources.export",
    "onnx": "models.sources.onnx",
    "checkpoint": "models.sources.checkpoint",
    "embedded": "models.sources.embedded",
}
"""Module of each source by the prefix of `ModelSpec.source`, with `build(request) -> Built`."""

_OF_LIBRARIES = ("torchvision", "timm", "embedded")

USUAL_PREPROCESS = Preprocess(resize=256, crop=(224, 224))
"""What most networks were trained with: the margin, mean and deviation of ImageNet."""
_MEANINGS: Mapping[Task, str] = {
    "embedding": "The network gives vectors: POST /v1/compare shows how similar two images are, and "
    "which parts make them similar.",
    "zero_shot": "The classes are texts that the network scores for an image: the labels here, or "
    "those of a request.",
    "segmentation": "A class's probability is the mean of its probabilities at all pixels, its score "
    "the mean over the pixels that it wins, or over the whole image where it wins none.",
}
"""What scores and probabilities mean, where that is not as for classifiers."""
_KEPT = "The text side of the network stays loaded for the labels of requests: {:.3g} MB."
_ASSUMED = (
    "Nothing says how images become the network's input: they are resized, cropped and normalised "
    "as for ImageNet, to {width} x {height}. If it was trained otherwise, say so under "
    "[models.preprocess]."
)


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """Arguments of a source.

    Attributes:
        name: what follows the source's prefix.
        pretrained: whether the library's own weights are wanted, which come with their own head.
        num_classes: scores per image of an architecture with other weights; None keeps its own.
        channels: of the images that the network takes, if configured.
        base_dir: directory that relative paths and modules of the configuration start from.
    """

    name: str
    pretrained: bool
    num_classes: int | None
    channels: int | None = None
    base_dir: Path

    def file(self) -> Path:
        """The file that `name` is the path of.

        Raises:
            ModelLoadFailed: it does not exist.
        """
        path = self.base_dir / self.name
        if not path.is_file():
            missing = FileNotFoundError(str(path.resolve()))
            raise ModelLoadFailed(f"The file {self.name} does not exist.") from missing
        return path


@dataclass(frozen=True, kw_only=True)
class Built:
    """Result of a source.

    Attributes:
        module: the architecture, with its own weights or, if they were not asked for, random ones.
        preprocess: the preprocessing that belongs to the weights.
        assumed_preprocess: whether that is a guess, which the model card says.
        labels: names of the classes that the weights were trained on, if known.
        task: how the scores are read, if known.
        texts: makes classes of texts, for a network that gives vectors of images and texts.
        ignored_keys: prefixes of checkpoint keys that belong to parts which only training uses.
        notes: what the operator should know of how it was built, as sentences.
    """

    module: nn.Module
    preprocess: Preprocess
    assumed_preprocess: bool = False
    labels: tuple[str, ...] | None = None
    task: Task | None = None
    texts: TextEncoder | None = None
    ignored_keys: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A network that was proved to answer: in eval mode, frozen, float32, on the CPU.

    Attributes:
        module: (N, channels, H, W) normalised float32 → (N, outputs) scores (logits).
        labels: `num_classes` names.
        task: how the scores are read: `single_label` for binary models of two scores, too.
        declared_task: the task as the configuration or the source says it.
        preprocess: how an image becomes its input, the configuration's overrides applied.
        texts: of the task `zero_shot`; the module's outputs are vectors then.
        notes: for the model card.
    """

    module: nn.Module
    labels: tuple[str, ...]
    num_classes: int
    task: Task
    declared_task: Task | None = None
    preprocess: Preprocess
    spec: ModelSpec
    texts: TextEncoder | None = None
    notes: tuple[str, ...] = ()


def load(spec: ModelSpec, base_dir: Path) -> LoadedModel:
    """Build the model that a catalog entry describes, load its weights, and prove it.

    Relative paths of the entry start from `base_dir`.

    Raises:
        ModelLoadFailed: the model cannot answer; the text names what the configuration got wrong.
    """
    # As in `import_source`.
    from models.checkpoints import check_digest
    from models.first_run import settle
    from models.inputs import fill_inputs
    from models.network_proof import prove_network
    from models.weights import fill_zero_heads, load_weights, seeded

    labels = read_labels(spec, base_dir)
    kind, _, name = spec.source.partition(":")
    request = BuildRequest(
        name=name,
        pretrained=spec.weights == "default",
        num_classes=_head_size(spec, labels),
        channels=spec.preprocess.channels,
        base_dir=base_dir,
    )
    source = import_source(spec)
    with seeded():
        built: Built = source.build(request)
        if spec.weights == "none":
            fill_zero_heads(built.module)
    declared = spec.task or built.task or "single_label"
    texts = _texts(built, declared, labels)
    task = declared if texts is None else texts.reads
    preprocess = spec.preprocess.over(built.preprocess)
    settled = settle(built.module, preprocess)
    found: tuple[str, ...] = ()
    if spec.weights_sha256 is not None:
        check_digest(spec.weights, spec.weights_sha256, base_dir=base_dir)
    if spec.weights not in ("default", "none"):
        found = load_weights(
            built.module,
            spec.weights,
            base_dir=base_dir,
            key=spec.weights_key,
            ignored=built.ignored_keys,
        )
    # As timm's networks have it.
    reset: Any = getattr(built.module, "reset_classifier", None)
    if task == "embedding" and reset is not None:
        reset(0)
    module = fill_inputs(built.module, spec.inputs)
    module = module.eval().requires_grad_(requires_grad=False)
    proved = prove_network(module, preprocess, task, output=spec.output)
    single_logit = task in ("binary", "segmentation") and proved.outputs == 1
    # A single logit tells two classes apart.
    num_classes = 2 if single_logit else 0 if task == "embedding" else proved.outputs
    if texts is not None:
        num_classes = len(labels or ())
    if spec.num_classes not in (None, num_classes, proved.outputs):
        library = spec.weights == "default" and kind != "python"
        own = " The default weights come with their own head." if library else ""
        raise ModelLoadFailed(
            f"The model has {num_classes} classes, but num_classes is {spec.num_classes}.{own}"
        )
    return LoadedModel(
        module=proved.module,
        labels=_labels(labels, built.labels, num_classes),
        num_classes=num_classes,
        task="single_label" if task == "binary" and not single_logit else task,
        declared_task=declared,
        preprocess=preprocess,
        spec=spec,
        texts=texts,
        notes=(
            *([_MEANINGS[declared]] if declared in _MEANINGS else []),
            *([] if texts is None else [_KEPT.format(texts.takes.memory_bytes / 1e6)]),
            *built.notes,
            *settled,
            *found,
            *_assumptions(spec, built, preprocess),
            *proved.notes,
        ),
    )


def import_source(spec: ModelSpec) -> ModuleType:
    """Import the module of an entry's source, and with it the library that it is about."""
    # Torch takes a second to import, which processes that only read SOURCES need not wait for.
    from models.compat import define_missing_operators, without_compiler

    define_missing_operators()
    kind = spec.source.partition(":")[0]
    with without_compiler() if kind in _OF_LIBRARIES else nullcontext():
        return importlib.import_module(SOURCES[kind])


def _texts(built: Built, task: Task, labels: tuple[str, ...] | None) -> TextEncoder | None:
    """What makes classes of texts, for the task `zero_shot`; its labels were checked."""
    if built.texts is None and task == "zero_shot":
        raise ModelLoadFailed(
            'task = "zero_shot" is for folders of transformers that hold a CLIP or SigLIP.'
        )
    if built.texts is None or task == "embedding":
        return None
    if task != "zero_shot":
        raise ModelLoadFailed(
            f'A network of images and texts has no classes of its own, as task = "{task}" needs: '
            'leave the task out, or set task = "embedding" to compare images.'
        )
    if labels is not None and len(labels) < 2 and built.texts.takes.exclusive:
        raise ModelLoadFailed(
            "One label alone has the probability 1 for every image: configure at least two, as in "
            'labels = ["a photo of a cat", "a photo of a dog"], or none, and send them in requests.'
        )
    if long := built.texts.too_long(labels or ()):
        raise ModelLoadFailed(long[1])
    return built.texts


def _head_size(spec: ModelSpec, labels: tuple[str, ...] | None) -> int | None:
    """Scores per image that the configuration asks for; one for binary models with labels."""
    if spec.num_classes is not None or labels is None:
        return spec.num_classes
    return 1 if spec.task == "binary" else len(labels)


def _assumptions(spec: ModelSpec, built: Built, preprocess: Preprocess) -> Iterator[str]:
    """What had to be assumed of the preprocessing, as sentences."""
    configured = spec.preprocess
    if built.assumed_preprocess and configured == PreprocessSpec():
        height, width = preprocess.crop
        yield _ASSUMED.format(width=width, height=height)
    known = configured.mean or configured.range
    if not known and len(built.preprocess.mean) != preprocess.channels:
        yield (
            "Pixels are scaled to [0, 1] and not normalised: [models.preprocess] has no mean and "
            f"std for {preprocess.channels} channel{'s' if preprocess.channels > 1 else ''}."
        )


def _labels(
    configured: tuple[str, ...] | None, library: tuple[str, ...] | None, num_classes: int
) -> tuple[str, ...]:
    if configured is None:
        known = library is not None and len(library) == num_classes
        return library if library and known else default_labels(num_classes)
    if len(configured) != num_classes:
        raise ModelLoadFailed(
            f"There are {len(configured)} labels, but the model has {num_classes} classes."
        )
    return configured
