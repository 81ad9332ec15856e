"""`torchvision:NAME`: an architecture of torchvision, with what its weight metadata says."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torchvision.models as zoo

from models.errors import ModelLoadFailed
from models.sources import BuildRequest, Built
from models.types import Preprocess

AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}
"""Heads that only training reads, by architecture; they are left out."""
_NOT_RESCALED = (
    "torchvision's rescaling of the input (transform_input) is off, as for networks trained from "
    "scratch. For weights fine-tuned from torchvision's own set preprocess.mean and "
    "preprocess.std to [0.5, 0.5, 0.5], which has the same effect."
)


def build(request: BuildRequest) -> Built:
    """Build a classification model of torchvision.

    Where other weights are loaded, preprocessing and labels are still those of the default weights:
    most checkpoints were fine-tuned from them. The rescaling of the input within Inception and
    GoogLeNet belongs to the library's weights alone, as in torchvision.

    Raises:
        ModelLoadFailed: unknown name, or its weights can neither be found nor fetched.
    """
    names = zoo.list_models(module=zoo)
    if request.name not in names:
        close = get_close_matches(request.name.lower(), names, n=3, cutoff=0.5)
        hint = f" Close names: {', '.join(close)}." if close else ""
        raise ModelLoadFailed(f"torchvision has no classification model {request.name}.{hint}")
    weights = zoo.get_model_weights(request.name).DEFAULT
    auxiliary = AUXILIARY.get(request.name, ())
    return Built(
        module=_pretrained(request.name, weights) if request.pretrained else _random(request),
        preprocess=_preprocess(weights.transforms()),
        labels=tuple(weights.meta["categories"]),
        ignored_keys=tuple(f"{head}." for head in auxiliary),
        notes=(_NOT_RESCALED,) if auxiliary and not request.pretrained else (),
    )


def _pretrained(name: str, weights: Any) -> Any:
    try:
        module = zoo.get_model(name, weights=weights, progress=False)
    except Exception as error:
        raise ModelLoadFailed(
            f"The default weights of torchvision's {name} are not on this machine "
            "and cannot be fetched."
        ) from error
    for head in AUXILIARY.get(name, ()):
        module.aux_logits = False
        setattr(module, head, None)
    return module


def _random(request: BuildRequest) -> Any:
    options: dict[str, Any] = {}
    if request.num_classes is not None:
        options["num_classes"] = request.num_classes
    if request.name in AUXILIARY:
        options |= {"aux_logits": False, "init_weights": True}
    return zoo.get_model(request.name, weights=None, **options)


def _preprocess(transforms: Any) -> Preprocess:
    """Read torchvision's `ImageClassification` preset; a short side is all it resizes to."""
    (resize,) = transforms.resize_size
    (crop,) = transforms.crop_size
    return Preprocess(
        resize=resize,
        crop=(crop, crop),
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )
