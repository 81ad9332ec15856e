"""How an image becomes the input of a model, and where that input lies in the image. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, dataclass_transform

import msgspec

Fit = Literal["stretch", "cover", "contain", "none"]
Order = Literal["rgb", "bgr"]
Centre = Literal["even", "down"]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Struct(msgspec.Struct, frozen=True, kw_only=True):
    """Base: immutable, keyword-only."""


class Region(Struct):
    """A rectangle in pixels of the original (EXIF-rotated) image; may be fractional."""

    x: float
    y: float
    width: float
    height: float


class Geometry(Struct):
    """Where the model input lies in the original image.

    Attributes:
        width: width of the original image in pixels, after EXIF rotation.
        height: its height.
        region: the part of the original that the model saw.
        input_width: width of the model input in pixels.
        input_height: its height.
    """

    width: int
    height: int
    region: Region
    input_width: int
    input_height: int


class Preprocess(Struct):
    """How an image becomes a model input: resize, centre-crop, scale to [0, 1], normalise.

    Attributes:
        resize: short side in pixels after resizing; a pair (height, width) resizes to exactly that.
        crop: (height, width) of the centre crop, the model input.
        fit: what a `resize` pair means: `stretch` to exactly that size (timm's crop mode
            `squash`), or keep the aspect ratio and `cover` it (timm's `center` where height and
            width differ) or be `contain`ed in it (timm's `border`; the crop is then padded with the
            mean colour, otherwise with black). With `none` images keep their size.
        interpolation: `bilinear` | `bicubic` | `nearest` | `lanczos` | `box` | `hamming`.
        mean, std: per channel as the network has them, of pixel values scaled to [0, 1].
        channels: 1 (grey), 3 (colours), or the bands of images that have others.
        order: of the three colours, as the network takes them.
        bits: what a sample is read with; at 16 no bit of deeper samples is dropped.
        padding: grey level around an image that is `contain`ed; None = the mean colour.
        centre: how half a pixel at the corner of a centred crop is rounded: to `even`, as
            torchvision does it, or `down`, as transformers does.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    fit: Fit = "stretch"
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channels: int = 3
    order: Order = "rgb"
    bits: int = 8
    padding: int | None = None
    centre: Centre = "even"

    @property
    def raw(self) -> bool:
        """Whether samples reach the network as stored, not as 8-bit colours or grey."""
        return self.bits > 8 or self.channels not in (1, 3)


class TextInput(Struct):
    """Texts that a model of the task `zero_shot` takes as classes.

    Attributes:
        most_tokens: limit of one text.
        full_length: whether each text is filled up to that.
        exclusive: whether probabilities are a softmax over all texts, rather than each text's own.
        text_ms: time for one text of full length.
        memory_bytes: of the network that encodes them.
    """

    most_tokens: int
    full_length: bool
    exclusive: bool
    text_ms: float = 0.0
    memory_bytes: int = 0

    def encoding_ms(self, labels: Sequence[str]) -> float:
        """Time to encode texts that a device does not know."""
        # A token has a byte at least; two mark the ends.
        tokens = sum(min(self.most_tokens, len(label.encode()) + 2) for label in labels)
        return self.text_ms * (len(labels) if self.full_length else tokens / self.most_tokens)
