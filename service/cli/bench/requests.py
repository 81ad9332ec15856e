"""The requests of a benchmark: images from a folder or drawn here, each as a body of its own."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
from PIL import Image

from models.types import Operation, Struct
from service.cli.files import find_images

_BOUNDARY = "heatlens-bench"
_GRAIN = 20
_JPEG_QUALITY = 85


class BenchError(Exception):
    """The benchmark cannot run; the text says why."""


class Unreachable(BenchError):
    """The service does not respond."""


class Request(Struct):
    """One HTTP request.

    Attributes:
        path: path and query, beginning with a slash.
        headers: in addition to those that every request has.
        image: number of the image in the body.
    """

    path: str
    body: bytes = b""
    headers: Mapping[str, str] = {}
    method: str = "POST"
    image: int = 0


def image_requests(
    images: Sequence[bytes],
    *,
    operation: Operation = "explain",
    options: Mapping[str, str] | None = None,
    key: str | None = None,
    form: bool = False,
) -> list[Request]:
    """Make one request for each image.

    Args:
        images: image files of any kind that the service reads.
        operation: endpoint below `/v1`.
        options: options of the API, such as `{"methods": "gradcam,layercam"}`.
        key: API key, sent as a bearer token.
        form: whether images are sent as files of forms, not as they are.
    """
    query = f"?{urlencode(options, safe=',')}" if options else ""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if form:
        headers |= {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
        images = list(map(_form, images))
    return [
        Request(path=f"/v1/{operation}{query}", body=data, headers=headers, image=number)
        for number, data in enumerate(images)
    ]


def _form(image: bytes) -> bytes:
    head = 'Content-Disposition: form-data; name="image"; filename="image"'
    return b"--%b\r\n%b\r\n\r\n%b\r\n--%b--\r\n" % (
        _BOUNDARY.encode(), head.encode(), image, _BOUNDARY.encode(),
    )  # fmt: skip


def of_megapixels(megapixels: float) -> tuple[int, int]:
    """Width and height, 4 to 3, of so many million pixels."""
    height = max(1, round((megapixels * 1e6 * 3 / 4) ** 0.5))
    return round(height * 4 / 3), height


def read_images(folder: Path, *, limit: int = 1000) -> list[bytes]:
    """Read the image files in a folder and its subfolders, sorted by path.

    Raises:
        BenchError: the folder has no images.
    """
    files = find_images([folder])[:limit]
    if not files:
        raise BenchError(f"There are no images in {folder}.")
    return [file.path.read_bytes() for file in files]


def draw_images(
    count: int = 64, *, size: tuple[int, int] = (500, 375), seed: int = 0
) -> list[bytes]:
    """Draw different JPEG images of `size` (width, height), about as large as photographs.

    The same seed draws the same images.
    """
    random = np.random.default_rng(seed)
    return [_draw(random, size) for _ in range(count)]


def _draw(random: np.random.Generator, size: tuple[int, int]) -> bytes:
    """One JPEG image: smooth waves of colour, a disc, and grain."""
    width, height = size
    waves = np.full((max(1, height // 4), max(1, width // 4), 3), 128, np.float32)
    y, x = np.mgrid[0 : waves.shape[0], 0 : waves.shape[1]].astype(np.float32) / max(waves.shape)
    for _ in range(6):
        along_x, along_y = random.uniform(-60, 60, 2)
        wave = np.sin(along_x * x + along_y * y + random.uniform(0, 2 * np.pi))
        waves += wave[..., None] * random.uniform(-25, 25, 3).astype(np.float32)
    centre = random.uniform(0.2, 0.6, 2)
    disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < random.uniform(0.01, 0.04)
    waves[disc] = random.uniform(0, 255, 3)
    smooth = Image.fromarray(np.clip(waves, 0, 255).astype(np.uint8)).resize(size)
    grain = random.integers(-_GRAIN, _GRAIN + 1, (height, width, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
