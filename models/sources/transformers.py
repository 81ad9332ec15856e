"""`transformers:FOLDER`: a network for images as transformers' `save_pretrained` writes it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.errors import ModelLoadFailed
from models.imaging.decode import DecodeLimits, from_pixels
from models.imaging.preprocess import preprocess
from models.sources import BuildRequest, Built
from models.sources.adapter import Adapter, without_adapter
from models.sources.zero_shot import KINDS, ImageVectors, encoder_of
from models.types import Preprocess, Task

_PROCESSOR = "preprocessor_config.json"
_TOLERANCE = 1e-3
_SEGMENTATION = "ForSemanticSegmentation"
_TASKS: dict[str, Task] = {"multi_label_classification": "multi_label"}


def build(request: BuildRequest) -> Built:
    """Load a folder: network, labels, task and preprocessing. No code of the folder is run.

    The network classifies images, or segments them, or gives vectors of images and texts. An adapter
    of LoRA in the folder is merged into its network, which may lie in the same folder.

    Preprocessing is that of the processor's Pillow form, and is compared with it on two images.

    Raises:
        ModelLoadFailed: transformers is not installed, or the folder holds no classifier of its.
    """
    folder = request.base_dir / request.name
    adapter = Adapter.of(folder, request.name)
    network = folder if adapter is None else adapter.network_in(folder, request.base_dir)
    adapter = adapter if request.pretrained else None
    config = _config(network, request.name)
    library = _library()
    segments = any(name.endswith(_SEGMENTATION) for name in config.get("architectures") or ())
    kind = library.AutoModelForImageClassification
    if segments:
        kind = library.AutoModelForSemanticSegmentation
    takes_texts = _takes_texts(config)
    if takes_texts:
        kind = library.AutoModel
    module = _network(library, kind, network, request=request, adapter=adapter)
    own = (folder / _PROCESSOR).is_file()
    processor = _processor(library, folder if own else network)
    notes: tuple[str, ...] = ()
    if processor is None:
        notes = (f"{request.name} has no {_PROCESSOR}.",)
    made = Preprocess(resize=256, crop=(224, 224)) if processor is None else _preprocess(processor)
    if processor is not None and not _same(processor, made):
        notes = (
            f"Not every step of the folder's {type(processor).__name__} is known here: compare "
            "scores, and correct [models.preprocess].",
        )
    if adapter is not None:
        notes = (*notes, f"The adapter in {request.name} is merged into the network's weights.")
    if takes_texts:
        return Built(
            module=ImageVectors(module),
            preprocess=made,
            task="zero_shot",
            texts=encoder_of(module, network, library),
            notes=notes,
            assumed_preprocess=processor is None,
        )
    names = [str(module.config.id2label.get(i)) for i in range(module.config.num_labels)]
    known = not all(name in ("None", f"LABEL_{i}") for i, name in enumerate(names))
    problem = config.get("problem_type") or ""
    task: Task | None = "binary" if len(names) == 1 else _TASKS.get(problem)
    return Built(
        module=module,
        preprocess=made,
        labels=tuple(names) if known else None,
        task="segmentation" if segments else task,
        notes=notes,
        assumed_preprocess=processor is None,
    )


def _takes_texts(config: dict[str, Any]) -> bool:
    """Whether a folder holds the whole network of images and texts, not a classifier made of it."""
    whole = any(name in ("CLIPModel", "SiglipModel") for name in config.get("architectures") or ())
    return whole and config.get("model_type") in KINDS


def _config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelLoadFailed(
            f"{name} is not a folder that save_pretrained wrote: it has no config.json."
        ) from error
    if "auto_map" in config:
        raise ModelLoadFailed(
            f"{name} needs code of its own (auto_map in config.json), which is not run. Use "
            "python:module:factory with that code."
        )
    return config


def _library() -> Any:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ModelLoadFailed(
            "transformers is not installed: pip install 'heatlens[transformers]'."
        ) from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _network(
    library: Any, kind: Any, folder: Path, *, request: BuildRequest, adapter: Adapter | None
) -> Any:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    missing: list[str] = []
    try:
        if request.pretrained:
            own = {"output_loading_info": True, "dtype": "float32"}
            if adapter is not None and request.num_classes is not None:
                # A classifier of other classes comes with the adapter.
                own |= {"num_labels": request.num_classes, "ignore_mismatched_sizes": True}
            with without_adapter(folder) as alone:
                module, report = kind.from_pretrained(alone, **own, **options)
            missing = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
        else:
            config = library.AutoConfig.from_pretrained(folder, **options)
            if request.num_classes is not None:
                config.num_labels = request.num_classes
            module = kind.from_config(config)
    except Exception as error:
        raise ModelLoadFailed(
            f"transformers reads no network that classifies or segments images from {request.name}."
        ) from error
    brought = set() if adapter is None else adapter.tensors.keys()
    if missing := sorted(set(missing) - brought):
        raise ModelLoadFailed(
            f"The weights in {request.name} lack {', '.join(missing[:3])}: the folder holds a "
            "network without its classifier."
        )
    if adapter is not None:
        adapter.merge(module)
    return module


def _processor(library: Any, folder: Path) -> Any:
    if not (folder / _PROCESSOR).is_file():
        return None
    try:
        return library.AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelLoadFailed(
            f"transformers reads no image processor from {folder.name}."
        ) from error


def _preprocess(processor: Any) -> Preprocess:
    """Read a processor: resize, centre crop, rescale, normalise."""

    def read(name: str, default: Any = None) -> Any:
        value = getattr(processor, name, None)
        return default if value is None else value

    resize, crop = _sizes(read)
    scale = 255 * read("rescale_factor", 1 / 255) if read("do_rescale") else 255.0
    offset = 1.0 if read("rescale_offset") else 0.0
    mean, std = (0.0,) * 3, (1.0,) * 3
    if read("do_normalize"):
        mean, std = tuple(read("image_mean", mean)), tuple(read("image_std", std))
    resample = Image.Resampling(int(read("resample", 2))).name.lower()
    return Preprocess(
        resize=resize,
        crop=crop,
        fit="stretch" if read("do_resize") else "none",
        interpolation=resample,
        mean=tuple((value + offset) / scale for value in mean),
        std=tuple(value / scale for value in std),
        order="bgr" if read("do_flip_channel_order") else "rgb",
        centre="down",
    )


def _sizes(read: Any) -> tuple[int | tuple[int, int], tuple[int, int]]:
    """What a processor resizes to, and what it crops from that."""
    size = dict(read("size", {}))
    short = size.get("shortest_edge")
    whole = (int(size.get("height") or short or 224), int(size.get("width") or short or 224))
    percentage = read("crop_pct")
    if short and percentage:
        # ConvNeXt's: a margin below 384 pixels, none from there.
        return (int(short / percentage) if short < 384 else whole), whole
    crop = dict(read("crop_size", {})) if read("do_center_crop") else {}
    cropped = (int(crop.get("height") or whole[0]), int(crop.get("width") or whole[1]))
    return (int(short) if short else whole), cropped


def _same(processor: Any, made: Preprocess) -> bool:
    """Whether two images, one wide and one high, become the same input."""
    generator = np.random.default_rng(0)
    for shape in ((90, 131, 3), (150, 77, 3)):
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        expected = np.asarray(processor(Image.fromarray(pixels))["pixel_values"][0])
        image = from_pixels(pixels, limits=DecodeLimits(), preprocess=made)
        found = preprocess(image, made)[0].astype(np.float64).transpose(2, 0, 1)
        found = found[::-1] if made.order == "bgr" else found
        mean, std = (np.array(v)[:, None, None] for v in (made.mean, made.std))
        found = (found / 255 - mean) / std
        if found.shape != expected.shape or np.abs(found - expected).max() > _TOLERANCE * max(
            1.0, np.abs(expected).max()
        ):
            return False
    return True
