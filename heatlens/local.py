"""`load`: the whole service in this process, without a socket, for notebooks and scripts."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from heatlens.asgi import ASGITransport
from heatlens.client import AsyncClient, Operations
from heatlens.errors import LoadFailed
from heatlens.results import Layer, ModelCard
from models.catalog import ModelSpec, default_spec
from models.errors import HeatlensError, ModelLoadFailed
from models.types import ModelCard as Card
from service.api.app import create_app
from service.settings import SecuritySettings, Settings
from service.worker.local import LocalPool

if TYPE_CHECKING:
    from heatlens.protocol import Call

T = TypeVar("T")

_LONG_S = 3600.0


def load(
    source: str | None = None,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    **entry: Any,
) -> LocalModel:
    """Load a model into this process.

    It is the service itself, without a socket: the same options, errors and results.

        model = heatlens.load("resnet50", weights="checkpoint.pth", num_classes=4)
        model.explain("cat.jpg")

    Args:
        source: as in the configuration (`timm:resnet50`, `python:my_module:build`); the name of a
            torchvision architecture alone will do. None loads the embedded default model.
        weights: `default`, `none` or a checkpoint.
        device: `auto`, `cpu` or `cuda:0`.
        entry: further keys of a `[[models]]` entry, such as `labels`, `num_classes` or `precision`.

    Raises:
        pydantic.ValidationError: a key or a value of the entry is wrong.
        LoadFailed: the model cannot be loaded.
    """
    return LocalModel(_spec(source, weights, entry), device=device)


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[AsyncClient]:
    """The service in this process, and a client of it.

    It asks for no keys, and long queues and long methods have their time.

    Raises:
        ModelLoadFailed: none of the models could be loaded.
    """
    widened = dict.fromkeys(("timeout_s", "max_timeout_s", "max_wait_s", "max_device_s"), _LONG_S)
    limits = settings.limits.model_copy(update=widened)
    settings = settings.model_copy(update={"limits": limits, "security": SecuritySettings()})
    pool = LocalPool(settings)
    app = create_app(settings, pool)
    async with app.router.lifespan_context(app):
        await pool.wait_loaded()
        _refuse_broken([info.card for info in pool.models()])
        transport = ASGITransport(app)
        async with AsyncClient(
            "http://heatlens", timeout_s=_LONG_S, attempts=1, transport=transport
        ) as client:
            yield client


def _refuse_broken(cards: Sequence[Card]) -> None:
    """Say why a model is broken: there is no other process to ask."""
    broken = [card for card in cards if card.reason]
    if broken and not any(card.ready for card in cards):
        cause = f" Cause: {broken[0].cause}" if broken[0].cause else ""
        raise ModelLoadFailed(
            f"The model could not be loaded: {broken[0].reason}{cause}", field="model"
        )


def _spec(source: str | None, weights: str | Path | None, entry: Mapping[str, Any]) -> ModelSpec:
    keys = dict(entry) if weights is None else {**entry, "weights": str(weights)}
    if source is None:
        return default_spec().model_copy(update=keys) if keys else default_spec()
    name = source if ":" in source else f"torchvision:{source}"
    short = name.rpartition(":")[2].rpartition("/")[2]
    return ModelSpec.model_validate({"name": short, **keys, "source": name})


class LocalModel(Operations):
    """A model in this process, with the methods of `Client`; made by `load`.

    It runs on threads of its own until it is closed or the process ends.
    """

    def __init__(self, spec: ModelSpec, *, device: str = "auto") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._stack = contextlib.AsyncExitStack()
        # The device's thread must end before the interpreter does, and `atexit` comes too late: no
        # thread can be asked for anything by then. concurrent.futures takes the same way.
        threading._register_atexit(self.close)  # type: ignore[attr-defined] # noqa: SLF001
        try:
            self._client = self._wait(self._start(_settings(spec, device)))
        except BaseException:
            self.close()
            raise
        self.name = spec.name

    @property
    def card(self) -> ModelCard:
        """What is known of the model."""
        return self._wait(self._client.models())[0]

    @property
    def layers(self) -> list[Layer]:
        """The layers of the model."""
        return self._wait(self._client.layers(self.name))

    @property
    def labels(self) -> list[str]:
        """The class names of the model."""
        return self._wait(self._client.labels(self.name))

    def close(self) -> None:
        """Free the model."""
        if self._loop.is_closed():
            return
        self._wait(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _start(self, settings: Settings) -> AsyncClient:
        try:
            return await self._stack.enter_async_context(serving(settings))
        except HeatlensError as error:
            raise LoadFailed(error.message) from None

    def _run(self, call: Call, kind: type[T]) -> T:
        return self._wait(self._client._run(call, kind))  # noqa: SLF001

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


def _settings(spec: ModelSpec, device: str) -> Settings:
    return Settings.model_validate(
        {
            "default_model": spec.name,
            "models": [spec.model_dump()],
            "server": {"devices": [device]},
        }
    )
