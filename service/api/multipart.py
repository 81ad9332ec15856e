"""`multipart/form-data` read as it arrives, within caps, into memory only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from models.errors import (
    BodyTooLarge,
    HeatlensError,
    ImageTooLarge,
    MalformedBody,
    TooManyImages,
)

IMAGE_PART = "image"
OPTIONS_PART = "options"

IMAGE_NAMES = frozenset(
    (IMAGE_PART, "image[]", "images", "images[]", "file", "file[]", "files", "files[]")
) | {"data", "upload", "picture", "photo"}
"""Names by which a part is an image; clients and form libraries differ."""

_FILE_TYPES = ("", "application/octet-stream")

_MAX_FIELDS = 64
_MAX_NAME = 64
_MAX_BOUNDARY = 200


@dataclass(frozen=True, slots=True)
class FormLimits:
    """Caps of a form: bytes of an image, bytes of all other parts together, number of images."""

    max_image_bytes: int
    max_options_bytes: int
    max_images: int


@dataclass(slots=True)
class Form:
    """What a form held: images in order (or why one is refused), and the other parts as (name, bytes)."""

    images: list[bytes | HeatlensError] = field(default_factory=list)
    fields: list[tuple[str, bytes]] = field(default_factory=list)


async def read_form(chunks: AsyncIterator[bytes], *, content_type: str, limits: FormLimits) -> Form:
    """Parse a form chunk by chunk.

    A part is an image if it has one of the usual names, or a file name and the content type of an
    image or none in particular. An image over its cap is dropped while it arrives and leaves its error in its place.

    Raises:
        MalformedBody: not a form, truncated, or too many parts.
        TooManyImages: more image parts than allowed.
        BodyTooLarge: the other parts are too large.
    """
    _, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary", b"")
    if not 0 < len(boundary) <= _MAX_BOUNDARY:
        raise MalformedBody("The multipart body names no boundary.")
    reader = _Reader(limits)
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": reader.begin_part,
            "on_header_field": reader.add_header_name,
            "on_header_value": reader.add_header_value,
            "on_header_end": reader.end_header,
            "on_headers_finished": reader.begin_data,
            "on_part_data": reader.add_data,
            "on_part_end": reader.end_part,
            "on_end": reader.end,
        },
    )
    try:
        async for chunk in chunks:
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise MalformedBody("The multipart body is malformed.") from error
    if not reader.complete:
        raise MalformedBody("The multipart body is truncated.")
    return reader.form


class _Reader:
    """Gathers one part after the other; the parser calls it."""

    def __init__(self, limits: FormLimits) -> None:
        self.form = Form()
        self.complete = False
        self._limits = limits
        self._field_bytes = 0
        self.begin_part()

    def begin_part(self) -> None:
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._content_type = ""
        self._name = ""
        self._is_image = False
        self._data = bytearray()
        self._error: HeatlensError | None = None

    def add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def end_header(self) -> None:
        name = self._header_name.lower()
        if name == b"content-disposition":
            self._disposition = self._header_value
        elif name == b"content-type":
            media_type = self._header_value.partition(b";")[0]
            self._content_type = media_type.decode("latin-1").strip().lower()
        self._header_name = self._header_value = b""

    def begin_data(self) -> None:
        kind, parameters = parse_options_header(self._disposition.decode("latin-1"))
        name = parameters.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not 0 < len(name) <= _MAX_NAME:
            raise MalformedBody("Each part of the form needs a name.")
        self._name = name
        self._is_image = name in IMAGE_NAMES or (
            b"filename" in parameters and name != OPTIONS_PART and self._may_be_image()
        )
        if self._is_image and len(self.form.images) >= self._limits.max_images:
            raise TooManyImages(f"A request has at most {self._limits.max_images} images.")
        if not self._is_image and len(self.form.fields) >= _MAX_FIELDS:
            raise MalformedBody("The form has too many parts.")

    def _may_be_image(self) -> bool:
        return self._content_type.startswith("image/") or self._content_type in _FILE_TYPES

    def add_data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_image:
            self._field_bytes += end - start
            if self._field_bytes > self._limits.max_options_bytes:
                raise BodyTooLarge(
                    f"The parts of the form that are not images, up to `{self._name}`, have more "
                    f"than {self._limits.max_options_bytes} bytes."
                )
        elif self._error is None and len(self._data) + end - start > self._limits.max_image_bytes:
            self._error = ImageTooLarge(
                f"The image has more than {self._limits.max_image_bytes} bytes."
            )
            self._data.clear()
        if self._error is None:
            self._data += memoryview(data)[start:end]

    def end_part(self) -> None:
        if self._is_image:
            self.form.images.append(self._error or bytes(self._data))
        else:
            self.form.fields.append((self._name, bytes(self._data)))

    def end(self) -> None:
        self.complete = True
