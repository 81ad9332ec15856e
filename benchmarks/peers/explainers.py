"""What every peer does with a picture: top-5 and a Grad-CAM overlay, as documented, and as an expert would.

Both answer the same: five classes, and the model's crop under its heatmap as a PNG picture. Chosen
by the environment, since each framework starts its workers in processes of its own: `PEER_MODEL`
and `PEER_TUNED`.
"""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.servers import model_entry
from models.catalog import ModelSpec
from models.sources import LoadedModel, load
from models.types import Preprocess

TARGET_LAYERS = {"efficientnet_lite0": "bn2", "resnet50": "layer4"}
TOP_K = 5
MAX_BATCH = 16

Prepared = tuple[Any, Any]
"""A picture as the model wants it, and as it is drawn under the heatmap."""
Explained = tuple[Tensor, Any]
"""Probabilities of all classes, and the map."""


class Explainer(Protocol):
    """The four steps, so that a framework can place each where it does such work."""

    def prepare(self, data: bytes) -> Prepared:
        """Decode and preprocess one picture."""
        ...

    def explain(self, prepared: list[Prepared]) -> list[Explained]:
        """Classify and explain a batch; not safe to call from two threads at once."""
        ...

    def answer(self, prepared: Prepared, explained: Explained) -> dict[str, Any]:
        """Draw, encode and describe."""
        ...


def chosen() -> Explainer:
    """The explainer that the environment asks for."""
    name = os.environ["PEER_MODEL"]
    spec = ModelSpec.model_validate(model_entry(name))
    loaded = load(spec, Path.cwd())
    layer = loaded.module.get_submodule(TARGET_LAYERS[name])
    return (
        Tuned(loaded, layer) if os.environ.get("PEER_TUNED") == "1" else Documented(loaded, layer)
    )


def described(probabilities: Tensor, png: bytes) -> dict[str, Any]:
    """The answer as JSON values."""
    values, indices = probabilities.topk(TOP_K)
    return {
        "predictions": [
            {"class_id": class_id, "probability": value}
            for class_id, value in zip(indices.tolist(), values.tolist(), strict=True)
        ],
        "heatmap": base64.b64encode(png).decode(),
    }


class Documented:
    """pytorch-grad-cam as its README shows it: one GradCAM object, top-1 of each picture, `show_cam_on_image`."""

    def __init__(self, loaded: LoadedModel, layer: nn.Module) -> None:
        from pytorch_grad_cam import GradCAM
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

        self._model = loaded.module.requires_grad_(requires_grad=True)  # as every library gives it
        self._cam = GradCAM(model=self._model, target_layers=[layer])
        self._style = loaded.preprocess
        interpolation = InterpolationMode(self._style.interpolation)
        self._crop = Compose(
            [Resize(self._style.resize, interpolation), CenterCrop(self._style.crop)]
        )

    def prepare(self, data: bytes) -> Prepared:
        """Decode with Pillow, torchvision's transforms, `preprocess_image`."""
        from pytorch_grad_cam.utils.image import preprocess_image

        picture = self._crop(Image.open(io.BytesIO(data)).convert("RGB"))
        pixels = np.float32(picture) / 255
        mean, std = list(self._style.mean), list(self._style.std)
        return preprocess_image(pixels, mean=mean, std=std)[0], pixels

    def explain(self, prepared: list[Prepared]) -> list[Explained]:
        """One call of the CAM object; it keeps the scores of its forward pass."""
        maps = self._cam(input_tensor=torch.stack([tensor for tensor, _ in prepared]), targets=None)
        probabilities = self._cam.outputs.detach().softmax(dim=1)
        return list(zip(probabilities, maps, strict=True))

    def answer(self, prepared: Prepared, explained: Explained) -> dict[str, Any]:
        """Overlay, and Pillow's PNG with its own settings."""
        from pytorch_grad_cam.utils.image import show_cam_on_image

        probabilities, heat = explained
        overlay = show_cam_on_image(prepared[1], heat, use_rgb=True)
        buffer = io.BytesIO()
        Image.fromarray(overlay).save(buffer, format="PNG")
        return described(probabilities, buffer.getvalue())


class Tuned:
    """What an expert makes of it: torch-cam, the trunk frozen by hand, channels last, uint8 until the batch, OpenCV."""

    def __init__(self, loaded: LoadedModel, layer: nn.Module) -> None:
        from torchcam.methods import GradCAM

        self._model = loaded.module.to(memory_format=torch.channels_last)
        layer.requires_grad_(requires_grad=True)  # everything before it stays frozen: no graph
        self._cam = GradCAM(self._model, target_layer=layer)
        style = loaded.preprocess
        self._mean = torch.tensor(style.mean) * 255
        self._std = torch.tensor(style.std) * 255
        self._style = style

    def prepare(self, data: bytes) -> Prepared:
        """Decode a JPEG no larger than needed, and resize only what is kept."""
        file = Image.open(io.BytesIO(data))
        side = short_side(self._style)
        file.draft("RGB", (side, side))
        picture = file.convert("RGB")
        height, width = self._style.crop
        scale = min(picture.size) / side
        box_width, box_height = width * scale, height * scale
        left, top = (picture.width - box_width) / 2, (picture.height - box_height) / 2
        kept = picture.resize(
            (width, height),
            Image.Resampling[self._style.interpolation.upper()],
            box=(left, top, left + box_width, top + box_height),
        )
        pixels = np.asarray(kept)
        return pixels, pixels

    def explain(self, prepared: list[Prepared]) -> list[Explained]:
        """Normalise the batch at once; a backward pass from the scores to the layer."""
        batch = torch.from_numpy(np.stack([pixels for pixels, _ in prepared]))
        inputs = ((batch - self._mean) / self._std).permute(0, 3, 1, 2)  # channels last already
        scores = self._model(inputs)
        classes = scores.argmax(dim=1).tolist()
        (maps,) = self._cam(class_idx=classes, scores=scores)
        self._cam.reset_hooks()
        return list(zip(scores.detach().softmax(dim=1), maps.numpy(), strict=True))

    def answer(self, prepared: Prepared, explained: Explained) -> dict[str, Any]:
        """Upsample, colour, blend and encode with OpenCV."""
        probabilities, heat = explained
        height, width = self._style.crop
        wide = cv2.resize(heat, (width, height))
        colours = cv2.applyColorMap((wide * 255).astype(np.uint8), cv2.COLORMAP_JET)
        picture = cv2.cvtColor(prepared[1], cv2.COLOR_RGB2BGR)
        blended = cv2.addWeighted(colours, 0.5, picture, 0.5, 0)
        _, png = cv2.imencode(".png", blended)
        return described(probabilities, png.tobytes())


def short_side(style: Preprocess) -> int:
    """Length that the shorter side of a picture is resized to."""
    return style.resize if isinstance(style.resize, int) else min(style.resize)
