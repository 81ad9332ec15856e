"""Reading a request body: three forms of images and options become one, within caps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
from fastapi import Request
from starlette.requests import ClientDisconnect

from models.errors import (
    BodyTooLarge,
    Cancelled,
    HeatlensError,
    ImageTooLarge,
    ImageUndecodable,
    InvalidOption,
    MalformedBody,
    TooManyImages,
    UnsupportedMediaType,
    UrlInputDisabled,
)
from models.imaging.decode import FORMATS, sniff
from service.api.compression import inflate
from service.api.json import OptionsT, decode_base64, json_object, validate
from service.api.multipart import IMAGE_PART, OPTIONS_PART, read_form
from service.api.options import ImageOption, list_options
from service.settings import LimitSettings

if TYPE_CHECKING:
    from service.api.fetch import UrlFetcher

FORM = "multipart/form-data"
JSON = "application/json"
BYTES = "application/octet-stream"

# Shorter JSON is read in less time than it takes to hand it to a thread.
_INLINE_JSON = 100_000

_CONCURRENT_FETCHES = 4

# curl calls whatever it posts a form.
_UNKNOWN = frozenset({"", "application/x-www-form-urlencoded"})
_WHOLE = _UNKNOWN | {JSON, BYTES, "application/x-image"}


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One image, or the error in its place; `targets` override the common ones.

    Attributes:
        data: an encoded image; pixels, uint8 (height, width, channels); or the model's normalised
            input, float32 (3, height, width).
    """

    data: bytes | np.ndarray = b""
    targets: list[Any] | None = None
    error: HeatlensError | None = None


Parsed = tuple[tuple[ImageInput, ...], dict[str, Any]]
"""Images, and options that are not validated yet."""

ReadInstance = Callable[[Any], dict[str, Any]]
"""Makes an element of `images` of one of `instances`."""


@dataclass(frozen=True, slots=True)
class RequestBody(Generic[OptionsT]):
    """A request's images, in order, and its options."""

    images: tuple[ImageInput, ...]
    options: OptionsT


class BodyReader:
    """Reads request bodies.

    Args:
        limits: caps.
        threads: the pool that decodes base64.
        fetcher: fetches image URLs; None = they are not allowed.
    """

    def __init__(
        self, limits: LimitSettings, *, threads: Executor, fetcher: UrlFetcher | None
    ) -> None:
        self._limits = limits
        self._threads = threads
        self._fetcher = fetcher

    async def read(self, request: Request, options: type[OptionsT]) -> RequestBody[OptionsT]:
        """Read the body in any of its forms, and check the options.

        Raises:
            HeatlensError: the body as a whole or an option is wrong.
        """
        images, values = await self.parse(request, options)
        return RequestBody(images=images, options=validate(options, values))

    async def parse(
        self, request: Request, options: type[OptionsT], *, instance: ReadInstance | None = None
    ) -> Parsed:
        """Read the body in any of its forms.

        Args:
            request: the request.
            options: its options; here they say which ones are lists.
            instance: reads the elements of `instances`, which JSON may then have in place of
                `images`; its options are `parameters`, and other keys are left alone.

        Raises:
            HeatlensError: the body as a whole is wrong.
        """
        content_type = request.headers.get("content-type", "")
        media_type = content_type.partition(";")[0].strip().lower()
        given = parse_query(request.query_params.multi_items(), options)
        body = self._body(request)
        if media_type == FORM:
            images, more = await self._read_form(body, content_type, options)
        elif media_type in _WHOLE or media_type.startswith("image/"):
            whole = b"".join([chunk async for chunk in body])
            images, more = await self._read_whole(whole, media_type, instance)
        else:
            allowed = ", ".join([FORM, JSON, *FORMATS, BYTES])
            raise UnsupportedMediaType(f"The content type is not accepted. Allowed: {allowed}.")
        return images, {**given, **more}

    async def read_bytes(self, request: Request) -> bytes:
        """Read the whole body, inflated if it is compressed.

        Raises:
            HeatlensError: it is too large, or not what its encoding says.
        """
        return b"".join([chunk async for chunk in self._body(request)])

    def _body(self, request: Request) -> AsyncIterator[bytes]:
        """The chunks of the body, inflated if it is compressed."""
        chunks, cap = self._received(request), self._limits.max_body_bytes
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding == "identity":
            return chunks
        return inflate(chunks, encoding=encoding, max_bytes=cap, threads=self._threads)

    async def _received(self, request: Request) -> AsyncIterator[bytes]:
        """The chunks as received; stops as soon as they exceed the cap, or are announced to."""
        cap = self._limits.max_body_bytes
        announced = request.headers.get("content-length", "")
        size = int(announced) if announced.isascii() and announced.isdecimal() else 0
        try:
            if size <= cap:
                size = 0
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > cap:
                        break
                    yield chunk
        except ClientDisconnect:
            raise Cancelled("The client disconnected while sending.") from None
        if size > cap:
            raise BodyTooLarge(f"The body has more than {cap} bytes.")

    async def _read_form(
        self, body: AsyncIterator[bytes], content_type: str, options: type[OptionsT]
    ) -> Parsed:
        form = await read_form(body, content_type=content_type, limits=self._limits)
        if not form.images:
            raise MalformedBody(f"The form has no image: send it as a file named `{IMAGE_PART}`.")
        images = tuple(_form_image(item) for item in form.images)
        texts = [(name, _text(data)) for name, data in form.fields if name != OPTIONS_PART]
        given = parse_query(texts, options)
        for name, data in form.fields:
            if name == OPTIONS_PART:
                given |= json_object(data)
        return images, given

    async def _read_whole(
        self, body: bytes, media_type: str, instance: ReadInstance | None
    ) -> Parsed:
        if not body.strip():
            raise MalformedBody("The body is empty.")
        if media_type == JSON or (media_type in _UNKNOWN and body.lstrip()[:1] == b"{"):
            return await self._read_json(body, instance)
        if len(body) > self._limits.max_image_bytes:
            raise ImageTooLarge(f"The image has more than {self._limits.max_image_bytes} bytes.")
        if sniff(body) is None:
            raise UnsupportedMediaType(
                f"The body is not an image of a known format. Allowed: {', '.join(FORMATS)}."
            )
        return (ImageInput(data=body),), {}

    async def _read_json(self, body: bytes, instance: ReadInstance | None) -> Parsed:
        if len(body) <= _INLINE_JSON:
            items, images, options = self._parse_json(body, instance)
        else:
            loop = asyncio.get_running_loop()
            items, images, options = await loop.run_in_executor(
                self._threads, self._parse_json, body, instance
            )
        if self._fetcher is not None:
            images = await self._fetch_all(self._fetcher, items, images)
        return tuple(images), options

    def _parse_json(
        self, body: bytes, instance: ReadInstance | None
    ) -> tuple[list[ImageOption], list[ImageInput], dict[str, Any]]:
        options = json_object(body)
        key = "images" if instance is None or "images" in options else "instances"
        raw = options.pop(key, None)
        if not isinstance(raw, list) or not raw:
            raise InvalidOption("Must be a list of at least one image.", field=key)
        if len(raw) > self._limits.max_images:
            raise TooManyImages(f"A request has at most {self._limits.max_images} images.")
        if instance is not None and key == "instances":
            raw, options = [instance(item) for item in raw], options.get("parameters") or {}
            if not isinstance(options, dict):
                raise InvalidOption("Must be an object.", field="parameters")
        items = [validate(ImageOption, item, prefix=f"{key}.{i}") for i, item in enumerate(raw)]
        for i, item in enumerate(items):
            if (item.b64 is None) == (item.url is None):
                raise InvalidOption("Either `b64` or `url` is required.", field=f"{key}.{i}")
            if item.url is not None and self._fetcher is None:
                text = "Image URLs are not enabled on this server."
                raise UrlInputDisabled(text, field=f"{key}.{i}.url")
        return items, [_from_base64(item, f"{key}.{i}") for i, item in enumerate(items)], options

    async def _fetch_all(
        self, fetcher: UrlFetcher, items: list[ImageOption], images: list[ImageInput]
    ) -> list[ImageInput]:
        """Fetch the images given by URL, a few at a time, together within the cap on bodies."""
        slots = asyncio.Semaphore(_CONCURRENT_FETCHES)
        room = self._limits.max_body_bytes

        async def fetch(i: int, url: str) -> ImageInput:
            nonlocal room
            async with slots:
                try:
                    data = await fetcher.fetch(url, max_bytes=self._limits.max_image_bytes)
                except UrlInputDisabled as error:
                    raise UrlInputDisabled(error.message, field=f"images.{i}.url") from None
                except HeatlensError as error:
                    return ImageInput(targets=items[i].targets, error=error)
            room -= len(data)
            if room < 0:
                raise BodyTooLarge("The images at the URLs are too large together.")
            return ImageInput(data=data, targets=items[i].targets)

        urls = {i: item.url for i, item in enumerate(items) if item.url is not None}
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {i: group.create_task(fetch(i, url)) for i, url in urls.items()}
        except* HeatlensError as errors:
            raise errors.exceptions[0] from None
        return [tasks[i].result() if i in tasks else image for i, image in enumerate(images)]


def parse_query(pairs: Iterable[tuple[str, str]], options: type[OptionsT]) -> dict[str, Any]:
    """Read options from text: lists are comma-separated or repeated, other options occur once.

    Raises:
        InvalidOption: an option is repeated or needs JSON; unknown ones are left to `validate`.
    """
    lists = list_options(options)
    values: dict[str, Any] = {}
    for name, text in pairs:
        if name == "interventions":
            reason = "Only possible as JSON, in the body or in the options part."
            raise InvalidOption(reason, field=name)
        if name in lists:
            items = [item.strip() for item in text.split(",") if item.strip()]
            values[name] = [*values.get(name, []), *items]
        elif name in values:
            raise InvalidOption("The option is given more than once.", field=name[:64])
        else:
            values[name] = text
    return values


def _form_image(item: bytes | HeatlensError) -> ImageInput:
    if isinstance(item, HeatlensError):
        return ImageInput(error=item)
    if not item:
        return ImageInput(error=UnsupportedMediaType("The image part of the form is empty."))
    return ImageInput(data=item)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise MalformedBody("A part of the form is not UTF-8 text.") from None


def _from_base64(item: ImageOption, field: str) -> ImageInput:
    text = item.b64
    if text is None:
        return ImageInput(targets=item.targets)
    try:
        data = decode_base64(text)
    except ImageUndecodable as found:
        error = ImageUndecodable(found.message, field=f"{field}.b64")
        return ImageInput(targets=item.targets, error=error)
    return ImageInput(data=data, targets=item.targets)
