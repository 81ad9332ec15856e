"""`timm:NAME`: an architecture of timm, or a folder, with its data configuration."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import timm
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

from models.catalog import Interpolation
from models.errors import ModelLoadFailed, close_names
from models.sources import BuildRequest, Built
from models.types import Fit, Preprocess

_FOLDER = "local-dir:"
"""timm's scheme for what `save_for_hf` wrote to a folder."""
_FITS: dict[str, Fit] = {"squash": "stretch", "border": "contain"}
"""How timm's crop modes other than `center` make an image fit a pair of sizes."""


def build(request: BuildRequest) -> Built:
    """Build a model of timm; the name may carry a pretrained tag (`resnet50.a1_in1k`).

    A folder that timm's `save_for_hf` wrote may stand in place of the name.

    Where other weights are loaded, preprocessing and labels are still those of the named weights:
    most checkpoints were fine-tuned from them.

    Raises:
        ModelLoadFailed: unknown name, no classifier, or its weights can neither be found nor fetched.
    """
    folder = request.base_dir / request.name
    if (folder / "config.json").is_file():
        request = replace(request, name=f"{_FOLDER}{folder.resolve()}")
    else:
        _check_name(request.name)
    module = _pretrained(request) if request.pretrained else _random(request)
    if not module.num_classes:
        raise ModelLoadFailed(f"timm's {request.name} has no classifier; configure num_classes.")
    return Built(module=module, preprocess=_preprocess(module), labels=_labels(module))


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = close_names(architecture, timm.list_models())
        raise ModelLoadFailed(f"timm has no model {architecture}.{hint}")
    known = timm.list_pretrained(f"{architecture}.*") if tag else []
    if tag and name not in known:
        raise ModelLoadFailed(f"timm has no weights {name}. Known: {', '.join(known) or 'none'}.")


def _pretrained(request: BuildRequest) -> Any:
    name = request.name
    try:
        return timm.create_model(name, pretrained=True, **_channels(request))
    except Exception as error:
        if name.startswith(_FOLDER):
            raise ModelLoadFailed(f"timm cannot read a model from {Path(name).name}.") from error
        raise ModelLoadFailed(
            f"The default weights of timm's {name} are not on this machine and cannot be fetched."
        ) from error


def _random(request: BuildRequest) -> Any:
    classes = request.num_classes
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    return timm.create_model(request.name, pretrained=False, **options, **_channels(request))


def _channels(request: BuildRequest) -> dict[str, Any]:
    return {} if request.channels is None else {"in_chans": request.channels}


def _preprocess(module: Any) -> Preprocess:
    """Read timm's data configuration as its evaluation transform does."""
    config = resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    scaled = math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"])
    mode = config["crop_mode"]
    short_side = mode == "center" and scaled[0] == scaled[1]
    # timm reads names it does not know (`random` among them) as bilinear.
    known = config["interpolation"] in get_args(Interpolation)
    return Preprocess(
        resize=scaled[0] if short_side else scaled,
        crop=(height, width),
        fit=_FITS.get(mode, "cover"),
        interpolation=config["interpolation"] if known else "bilinear",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        channels=channels,
    )


def _labels(module: Any) -> tuple[str, ...] | None:
    own = module.pretrained_cfg.get("label_names")
    if own:
        return tuple(map(str, own))
    subset = infer_imagenet_subset(module)
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else None
