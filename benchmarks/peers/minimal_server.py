"""The least that a server can be: one process, one thread a core, and the engine without a service around it.

    python -m benchmarks.peers.minimal_server PORT WORKERS

A thread takes what waits, decodes, runs the engine and draws. Nothing is checked, limited, priced,
cancelled, retried or measured, and an image is resized straight from the box of its crop, which is
not quite what the network was trained with. `PEER_MODEL` and `PEER_PRECISION` choose the network;
`/explain?defaults=1` answers what Heatlens does by default, `/explain` the heatmap alone.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import queue
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from PIL import Image

from benchmarks.peers.explainers import MAX_BATCH, TOP_K, short_side
from benchmarks.servers import model_entry
from models.catalog import ModelSpec
from models.engine import Engine
from models.heap import keep_heap
from models.imaging import png
from models.imaging.colormaps import COLORMAPS
from models.registry import ModelRegistry
from models.types import TOP1, Job, JobOptions, Outcome, Preprocess

_PALETTE = COLORMAPS["turbo"]
_OPACITY = np.arange(256, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request on its way to a thread."""

    data: bytes
    has_defaults: bool
    answer: asyncio.Future[bytes]


class Model:
    """A network and its engine, owned by one thread."""

    def __init__(self, spec: ModelSpec) -> None:
        registry = ModelRegistry("cpu", Path.cwd())
        info = registry.load(spec)
        assert info.card.input is not None
        assert info.card.target_layer is not None
        self.spec, self.style = spec, info.card.input
        self.layer, self.labels = info.card.target_layer, info.labels
        self.engine = Engine(registry)

    def answer(self, asked: Sequence[Asked]) -> list[bytes]:
        """Answer a batch of requests."""
        inputs = [resized(item.data, self.style) for item in asked]
        jobs = [
            Job(
                id=str(number),
                operation="explain",
                model=self.spec.name,
                version=self.spec.version,
                input=pixels,
                options=JobOptions(
                    top_k=TOP_K,
                    targets=(TOP1,),
                    methods=("gradcam",),
                    layers=(self.layer,),
                    statistics=item.has_defaults,
                ),
            )
            for number, (item, pixels) in enumerate(zip(asked, inputs, strict=True))
        ]
        outcomes = zip(asked, inputs, self.engine.run(jobs), strict=True)
        return [self._draw(*item) for item in outcomes]

    def _draw(self, asked: Asked, pixels: np.ndarray, outcome: Any) -> bytes:
        assert isinstance(outcome, Outcome)
        levels = _levels(outcome.explanations[0].map, pixels.shape[:2])
        heatmap = png.encode_palette(levels, palette=_PALETTE, opacity=_OPACITY)
        answer: dict[str, Any] = {
            "predictions": [
                {
                    "class_id": item.class_id,
                    "label": self.labels[item.class_id] if self.labels else "",
                    "score": item.score,
                    "probability": item.probability,
                }
                for item in outcome.predictions
            ],
            "heatmap": base64.b64encode(heatmap).decode(),
        }
        if asked.has_defaults:
            answer["overlay"] = base64.b64encode(_overlay(levels, pixels)).decode()
            answer["statistics"] = outcome.statistics
        return msgspec.json.encode(answer)


def resized(data: bytes, style: Preprocess) -> np.ndarray:
    """Decode an image no larger than needed, and resize no more than is kept."""
    image: Image.Image = Image.open(io.BytesIO(data))
    side = short_side(style)
    image.draft("RGB", (2 * side, 2 * side))
    image = image.convert("RGB")
    height, width = style.crop
    scale = min(image.size) / side
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    resample = Image.Resampling[style.interpolation.upper()]
    return np.array(image.resize((width, height), resample, box=box))


def _levels(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    low, span = values.min(), np.ptp(values) or 1.0
    map_image = Image.fromarray((values - low) * np.float32(255 / span))
    return np.asarray(map_image.resize(size[::-1], Image.Resampling.BILINEAR)).astype(np.uint8)


def _overlay(levels: np.ndarray, pixels: np.ndarray) -> bytes:
    coloured = Image.fromarray(levels)
    coloured.putpalette(_PALETTE.tobytes())
    buffer = io.BytesIO()
    blended = Image.blend(Image.fromarray(pixels), coloured.convert("RGB"), 0.5)
    blended.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


class Threads:
    """Threads that each own a model and answer what waits."""

    def __init__(self, spec: ModelSpec, *, count: int) -> None:
        self._spec = spec
        self._count = count
        self._waiting: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        self._ready = threading.Barrier(count + 1)
        self._loading = threading.Lock()

    async def start(self) -> None:
        """Return when every thread has its model."""
        self._loop = asyncio.get_running_loop()
        for _ in range(self._count):
            threading.Thread(target=self._work, daemon=True).start()
        await asyncio.to_thread(self._ready.wait)

    async def answer(self, data: bytes, *, has_defaults: bool) -> bytes:
        """Answer one request."""
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._waiting.put(Asked(data, has_defaults, answer))
        return await answer

    def _work(self) -> None:
        torch.set_num_threads(1)
        # Probes of a load are not made for two at once.
        with self._loading:
            model = Model(self._spec)
        self._ready.wait()
        while True:
            taken = self._take()
            self._loop.call_soon_threadsafe(_deliver, taken, model.answer(taken))

    def _take(self) -> list[Asked]:
        taken = [self._waiting.get()]
        while len(taken) < MAX_BATCH:
            try:
                taken.append(self._waiting.get_nowait())
            except queue.Empty:
                break
        return taken


def _deliver(taken: Sequence[Asked], answers: Sequence[bytes]) -> None:
    for item, answer in zip(taken, answers, strict=True):
        if not item.answer.done():
            item.answer.set_result(answer)


def create_app(threads: Threads) -> FastAPI:
    """Build the application; it listens when the threads are ready."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await threads.start()
        yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/explain")
    async def explain(request: Request) -> Response:
        has_defaults = request.query_params.get("defaults") == "1"
        answer = await threads.answer(await request.body(), has_defaults=has_defaults)
        return Response(answer, media_type="application/json")

    return app


def main() -> None:
    """Serve the model that the environment asks for."""
    keep_heap()
    entry = model_entry(os.environ["PEER_MODEL"], precision=os.environ["PEER_PRECISION"])
    threads = Threads(ModelSpec.model_validate(entry), count=int(sys.argv[2]))
    app = create_app(threads)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
