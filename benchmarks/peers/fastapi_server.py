"""Plain FastAPI: an upload, a thread of the pool for each request, one lock around the model.

python -m benchmarks.peers.fastapi_server PORT WORKERS
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from benchmarks.peers.explainers import Explainer, chosen


def create_app() -> FastAPI:
    """Build the application that the environment asks for; each process has its own model."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.explainer = chosen()
        yield

    app = FastAPI(lifespan=lifespan)
    lock = threading.Lock()  # a CAM object remembers its last pass

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    def work(explainer: Explainer, data: bytes) -> dict[str, Any]:
        prepared = explainer.prepare(data)
        with lock:
            (explained,) = explainer.explain([prepared])
        return explainer.answer(prepared, explained)

    if os.environ.get("PEER_TUNED") == "1":

        @app.post("/explain")
        async def explain_body(request: Request) -> JSONResponse:
            data = await request.body()
            return JSONResponse(await run_in_threadpool(work, request.app.state.explainer, data))

    else:

        @app.post("/explain")
        def explain(request: Request, image: UploadFile) -> dict[str, Any]:
            return work(request.app.state.explainer, image.file.read())

    return app


if __name__ == "__main__":
    uvicorn.run(
        "benchmarks.peers.fastapi_server:create_app",
        factory=True,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        workers=int(sys.argv[2]),
        log_level="warning",
    )
