"""`Client` and `AsyncClient`: the service's operations as methods."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar, Unpack

import httpx

from heatlens import protocol
from heatlens.errors import ConnectionFailed, HeatlensError, TimedOut
from heatlens.protocol import Answer, Call, EventReader, OnPartial, OnProgress, Retries
from heatlens.results import (
    CompareResponse,
    ExplainResponse,
    FeaturesResponse,
    Layer,
    ModelCard,
    Models,
    PredictResponse,
    decode,
)

if TYPE_CHECKING:
    from heatlens.images import ImageLike
    from heatlens.options import (
        CompareOptions,
        ExplainOptions,
        FeaturesOptions,
        PredictOptions,
    )

DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_S = 10.0

T = TypeVar("T")


class Explained(NamedTuple):
    """One image of `explain_many`: its response, or the error that it ended in."""

    image: ImageLike
    response: ExplainResponse | None
    error: HeatlensError | OSError | None


class _Settings:
    """What both clients are made with."""

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        attempts: int = 4,
        **http: Any,
    ) -> None:
        """Make a client.

        Args:
            url: of the service; None takes the environment variable `HEATLENS_URL`, and without it
                the address that `heatlens serve` binds.
            api_key: None takes the environment variable `HEATLENS_API_KEY`, if it is set.
            timeout_s: seconds to wait for a request with all its retries; a stream of events may
                take longer, as long as events come.
            attempts: how often a request is sent at most. Sent again are those that could not reach
                the service, and those that it refused as `retryable`, after the time that its
                `Retry-After` asks for.
            http: further arguments of httpx's client, such as `verify` or `transport`.
        """
        key = api_key or os.environ.get("HEATLENS_API_KEY")
        headers = {"User-Agent": "heatlens-python", **({"X-API-Key": key} if key else {})}
        self._retries = Retries(attempts=attempts, timeout_s=timeout_s)
        self._settings = {
            "base_url": url or os.environ.get("HEATLENS_URL") or DEFAULT_URL,
            "headers": headers,
            **http,
        }


class Operations:
    """The operations of blocking clients."""

    def predict(self, *images: ImageLike, **options: Unpack[PredictOptions]) -> PredictResponse:
        """Classify images."""
        return self._run(protocol.operation("predict", images, options), PredictResponse)

    def explain(
        self,
        *images: ImageLike,
        on_progress: OnProgress | None = None,
        on_partial: OnPartial | None = None,
        **options: Unpack[ExplainOptions],
    ) -> ExplainResponse:
        """Classify images and explain their classes.

        Args:
            images: as paths, bytes, PIL images or arrays.
            on_progress: called about once a second with a `Progress`, which tells the seconds left.
            on_partial: called with a `PartialMap` whenever a map of a long method has become clearer.
            options: see `heatlens.options`.
        """
        call = protocol.operation(
            "explain", images, options, on_progress=on_progress, on_partial=on_partial
        )
        return self._run(call, ExplainResponse)

    def features(self, *images: ImageLike, **options: Unpack[FeaturesOptions]) -> FeaturesResponse:
        """Describe the feature maps of layers, or their gradients."""
        return self._run(protocol.operation("features", images, options), FeaturesResponse)

    def compare(
        self, one: ImageLike, other: ImageLike, **options: Unpack[CompareOptions]
    ) -> CompareResponse:
        """Compare two images by a model that gives vectors, and show what makes them similar."""
        return self._run(protocol.operation("compare", (one, other), options), CompareResponse)

    def _run(self, call: Call, kind: type[T]) -> T:
        """Send a call until it is answered."""
        raise NotImplementedError


class Client(Operations, _Settings):
    """A blocking client of one service; threads may share it.

    Its methods raise `APIError` where the service refuses a request, `ConnectionFailed` where it
    cannot be reached, and `OSError` where an image file cannot be read. Every option of the API is a
    keyword argument; see `heatlens.options`.

        with Client() as client:
            response = client.explain("cat.jpg", methods=["gradcam", "layercam"])
            response.top1.label
            response.explanation.overlay.show()
    """

    def __init__(self, url: str | None = None, **settings: Any) -> None:
        super().__init__(url, **settings)
        self._http = httpx.Client(**self._settings)

    def raw(
        self,
        operation: str,
        *images: ImageLike,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The JSON of an operation (`predict`, `explain`, …) as it was sent."""
        call = protocol.operation(operation, images, options, on_progress=on_progress)
        return self._run(call, dict[str, Any])

    def explain_many(
        self,
        images: Iterable[ImageLike],
        *,
        in_flight: int = 8,
        **options: Unpack[ExplainOptions],
    ) -> Iterator[Explained]:
        """Explain any number of images, in order, with a bounded number of requests in flight.

        An image that cannot be explained carries its error; the others go on.
        """

        def explain(image: ImageLike) -> Explained:
            try:
                return Explained(image, self.explain(image, **options), None)
            except (HeatlensError, OSError) as error:
                return Explained(image, None, error)

        waiting: deque[Future[Explained]] = deque()
        with ThreadPoolExecutor(in_flight) as threads:
            for image in images:
                waiting.append(threads.submit(explain, image))
                if len(waiting) == in_flight:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def models(self) -> list[ModelCard]:
        """The cards of all models, those of the default one first."""
        return self._run(Call("GET", "/v1/models"), Models).default_first()

    def layers(self, model: str) -> list[Layer]:
        """The layers of a model."""
        return self._run(Call("GET", f"/v1/models/{model}/layers"), list[Layer])

    def labels(self, model: str) -> list[str]:
        """The class names of a model."""
        return self._run(Call("GET", f"/v1/models/{model}/labels"), list[str])

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, call: Call, kind: type[T]) -> T:
        steps = protocol.exchange(call, self._retries)
        try:
            step = next(steps)
            while True:
                if step.pause_s:
                    time.sleep(step.pause_s)
                try:
                    answer = self._send(step)
                except (httpx.HTTPError, ConnectionFailed) as error:
                    step = steps.throw(_failed(error))
                else:
                    step = steps.send(answer)
        except StopIteration as done:
            return decode(done.value, kind)

    def _send(self, call: Call) -> Answer:
        with self._http.stream(**_arguments(call)) as response:
            if not call.has_events or response.status_code != 200:
                return _answer(response, response.read())
            reader = EventReader(call)
            for line in response.iter_lines():
                reader.feed(line)
            return reader.answer()


class AsyncClient(_Settings):
    """The asynchronous twin of `Client`; it belongs to one event loop.

    async with AsyncClient() as client:
        response = await client.explain("cat.jpg")
    """

    def __init__(self, url: str | None = None, **settings: Any) -> None:
        super().__init__(url, **settings)
        self._http = httpx.AsyncClient(**self._settings)

    async def predict(
        self, *images: ImageLike, **options: Unpack[PredictOptions]
    ) -> PredictResponse:
        """Classify images."""
        return await self._run(protocol.operation("predict", images, options), PredictResponse)

    async def explain(
        self,
        *images: ImageLike,
        on_progress: OnProgress | None = None,
        on_partial: OnPartial | None = None,
        **options: Unpack[ExplainOptions],
    ) -> ExplainResponse:
        """Classify images and explain their classes; see `Client.explain`.

        Cancelling this cancels the work on the device.
        """
        call = protocol.operation(
            "explain", images, options, on_progress=on_progress, on_partial=on_partial
        )
        return await self._run(call, ExplainResponse)

    async def features(
        self, *images: ImageLike, **options: Unpack[FeaturesOptions]
    ) -> FeaturesResponse:
        """Describe the feature maps of layers, or their gradients."""
        return await self._run(protocol.operation("features", images, options), FeaturesResponse)

    async def compare(
        self, one: ImageLike, other: ImageLike, **options: Unpack[CompareOptions]
    ) -> CompareResponse:
        """Compare two images; see `Client.compare`."""
        return await self._run(
            protocol.operation("compare", (one, other), options), CompareResponse
        )

    async def raw(
        self,
        operation: str,
        *images: ImageLike,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The JSON of `predict`, `explain` or `features` as it was sent."""
        call = protocol.operation(operation, images, options, on_progress=on_progress)
        return await self._run(call, dict[str, Any])

    async def explain_many(
        self,
        images: Iterable[ImageLike],
        *,
        in_flight: int = 8,
        **options: Unpack[ExplainOptions],
    ) -> AsyncIterator[Explained]:
        """Explain any number of images; see `Client.explain_many`."""

        async def explain(image: ImageLike) -> Explained:
            try:
                return Explained(image, await self.explain(image, **options), None)
            except (HeatlensError, OSError) as error:
                return Explained(image, None, error)

        waiting: deque[asyncio.Task[Explained]] = deque()
        try:
            for image in images:
                waiting.append(asyncio.create_task(explain(image)))
                if len(waiting) == in_flight:
                    yield await waiting.popleft()
            while waiting:
                yield await waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()

    async def models(self) -> list[ModelCard]:
        """The cards of all models, those of the default one first."""
        return (await self._run(Call("GET", "/v1/models"), Models)).default_first()

    async def layers(self, model: str) -> list[Layer]:
        """The layers of a model."""
        return await self._run(Call("GET", f"/v1/models/{model}/layers"), list[Layer])

    async def labels(self, model: str) -> list[str]:
        """The class names of a model."""
        return await self._run(Call("GET", f"/v1/models/{model}/labels"), list[str])

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, call: Call, kind: type[T]) -> T:
        steps = protocol.exchange(call, self._retries)
        try:
            step = next(steps)
            while True:
                if step.pause_s:
                    await asyncio.sleep(step.pause_s)
                try:
                    answer = await self._send(step)
                except (httpx.HTTPError, ConnectionFailed) as error:
                    step = steps.throw(_failed(error))
                else:
                    step = steps.send(answer)
        except StopIteration as done:
            return decode(done.value, kind)

    async def _send(self, call: Call) -> Answer:
        async with self._http.stream(**_arguments(call)) as response:
            if not call.has_events or response.status_code != 200:
                return _answer(response, await response.aread())
            reader = EventReader(call)
            async for line in response.aiter_lines():
                reader.feed(line)
            return reader.answer()


def _arguments(call: Call) -> dict[str, Any]:
    return {
        "method": call.method,
        "url": call.path,
        "headers": call.headers,
        "files": list(call.files) or None,
        "timeout": httpx.Timeout(call.timeout_s, connect=min(call.timeout_s, _CONNECT_S)),
    }


def _answer(response: httpx.Response, body: bytes) -> Answer:
    # A proxy may send a date in its place (RFC 9110, section 10.2.3): our own pause will do then.
    retry_after = response.headers.get("Retry-After", "")
    seconds = float(retry_after) if retry_after.isdecimal() else None
    return Answer(response.status_code, body, seconds)


def _failed(error: httpx.HTTPError | ConnectionFailed) -> ConnectionFailed:
    if isinstance(error, ConnectionFailed):
        return error
    url = error.request.url.copy_with(path="/")
    failed: ConnectionFailed
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        failed = TimedOut(f"{url} did not answer within timeout_s.")
    else:
        failed = ConnectionFailed(
            f"{url} could not be reached: {str(error) or type(error).__name__}"
        )
    failed.__cause__ = error
    return failed
