"""`torchvision:NAME`: a classifier or segmentation network of torchvision, with its metadata."""

from __future__ import annotations

from typing import Any

import torchvision.models as zoo

from models.errors import ModelLoadFailed, close_names
from models.sources import BuildRequest, Built
from models.types import Preprocess

AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}
"""Heads that only training reads, by architecture; they are left out."""
_AUXILIARY_MAPS = "aux_classifier."
_SQUASHED = (
    "torchvision segments images of any shape with their short side at {side}; here they are squashed "
    "to {side} x {side}. Set [models.preprocess] for another size or mode."
)
_NOT_RESCALED = (
    "torchvision's rescaling of the input (transform_input) is off, as for networks trained from "
    "scratch. For weights fine-tuned from torchvision's own set preprocess.mean and "
    "preprocess.std to [0.5, 0.5, 0.5], which has the same effect."
)


def build(request: BuildRequest) -> Built:
    """Build a classification or segmentation model of torchvision.

    Where other weights are loaded, preprocessing and labels are still those of the default weights:
    most checkpoints were fine-tuned from them. The rescaling of the input within Inception and
    GoogLeNet belongs to the library's weights alone, as in torchvision.

    Raises:
        ModelLoadFailed: unknown name, or its weights can neither be found nor fetched.
    """
    names = [*zoo.list_models(module=zoo), *zoo.list_models(module=zoo.segmentation)]
    if request.name not in names:
        hint = close_names(request.name, names)
        raise ModelLoadFailed(
            f"torchvision has no classification or segmentation model {request.name}.{hint}"
        )
    weights = zoo.get_model_weights(request.name).DEFAULT
    segments = request.name in zoo.list_models(module=zoo.segmentation)
    backbone = {"weights_backbone": None} if segments else {}
    pretrained, name = request.pretrained, request.name
    module = _pretrained(name, weights) if pretrained else _random(request, **backbone)
    if segments:
        return _segmentation(module, weights)
    auxiliary = AUXILIARY.get(request.name, ())
    return Built(
        module=module,
        preprocess=_preprocess(weights.transforms()),
        labels=tuple(weights.meta["categories"]),
        ignored_keys=tuple(f"{head}." for head in auxiliary),
        notes=(_NOT_RESCALED,) if auxiliary and not request.pretrained else (),
    )


def _segmentation(module: Any, weights: Any) -> Built:
    transforms = weights.transforms()
    (side,) = transforms.resize_size
    return Built(
        module=module,
        preprocess=_normalised(transforms, resize=(side, side), crop=side),
        labels=tuple(weights.meta["categories"]),
        task="segmentation",
        ignored_keys=(_AUXILIARY_MAPS,),
        notes=(_SQUASHED.format(side=side),),
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


def _random(request: BuildRequest, **options: Any) -> Any:
    if request.num_classes is not None:
        options["num_classes"] = request.num_classes
    if request.name in AUXILIARY:
        options |= {"aux_logits": False, "init_weights": True}
    return zoo.get_model(request.name, weights=None, **options)


def _preprocess(transforms: Any) -> Preprocess:
    """Read torchvision's `ImageClassification` preset; a short side is all it resizes to."""
    (resize,) = transforms.resize_size
    (crop,) = transforms.crop_size
    return _normalised(transforms, resize=resize, crop=crop)


def _normalised(transforms: Any, *, resize: int | tuple[int, int], crop: int) -> Preprocess:
    return Preprocess(
        resize=resize,
        crop=(crop, crop),
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )
