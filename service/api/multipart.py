"""Reading `multipart/form-data` as it arrives, within caps, into memory only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header

from models.errors import BodyTooLarge, HeatlensError, ImageTooLarge, MalformedBody, TooManyImages
from service.settings import LimitSettings

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


@dataclass(slots=True)
class Form:
    """A form: images in order, each or its error, and the other parts as (name, bytes)."""

    images: list[bytes | HeatlensError] = field(default_factory=list)
    fields: list[tuple[str, bytes]] = field(default_factory=list)


async def read_form(
    chunks: AsyncIterator[bytes], *, content_type: str, limits: LimitSettings
) -> Form:
    """Parse a form chunk by chunk.

    A part is an image if it has one of the usual names, or a file name and the content type of an
    image or none in particular. An image over its cap is dropped while it arrives; its error takes
    its place.

    Raises:
        MalformedBody: the body is not a form, is truncated or has too many parts.
        TooManyImages: there are more image parts than allowed.
        BodyTooLarge: the other parts are too large together.
    """
    _, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary", b"")
    if not 0 < len(boundary) <= _MAX_BOUNDARY:
        raise MalformedBody("The content type of the multipart body lacks a valid boundary.")
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
        },
    )
    try:
        async for chunk in chunks:
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise MalformedBody("The multipart body is malformed.") from error
    if parser.state != MultipartState.END:
        raise MalformedBody("The multipart body is truncated.")
    return reader.form


class _Reader:
    """Collects the parts; its methods are the callbacks of the parser."""

    def __init__(self, limits: LimitSettings) -> None:
        self.form = Form()
        self._limits = limits
        self._field_bytes = 0
        self.begin_part()

    def begin_part(self) -> None:
        self._header_name = self._header_value = self._disposition = b""
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
        self._name = parameters.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not 0 < len(self._name) <= _MAX_NAME:
            raise MalformedBody("Each part of the form needs a name.")
        self._is_image = self._name in IMAGE_NAMES or (
            b"filename" in parameters and self._name != OPTIONS_PART and self._may_be_image()
        )
        if not self._is_image and len(self.form.fields) >= _MAX_FIELDS:
            raise MalformedBody("The form has too many parts.")
        if self._is_image and len(self.form.images) >= self._limits.max_images:
            raise TooManyImages(f"A request has at most {self._limits.max_images} images.")

    def _may_be_image(self) -> bool:
        return self._content_type.startswith("image/") or self._content_type in _FILE_TYPES

    def add_data(self, data: bytes, start: int, end: int) -> None:
        limits, size = self._limits, end - start
        if not self._is_image:
            self._field_bytes += size
            if self._field_bytes > limits.max_options_bytes:
                raise BodyTooLarge(
                    f"The parts of the form that are not images, up to `{self._name}`, have more "
                    f"than {limits.max_options_bytes} bytes."
                )
        elif self._error is None and len(self._data) + size > limits.max_image_bytes:
            self._error = ImageTooLarge(f"The image has more than {limits.max_image_bytes} bytes.")
            self._data.clear()
        if self._error is None:
            self._data += memoryview(data)[start:end]

    def end_part(self) -> None:
        if self._is_image:
            self.form.images.append(self._error or bytes(self._data))
        else:
            self.form.fields.append((self._name, bytes(self._data)))
