"""An HTTP process with a small ASGI application in place of the service's own.

The response to `POST /` with an image of the fake engine is its class, or the error's code.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import uuid

import numpy as np

from models.errors import HeatlensError
from models.types import Job, JobOptions
from service.api import process as http_process
from service.devices.messages import Submission
from service.devices.pool import DevicePool
from service.settings import Settings

SIDE = 8


class SmallApp:
    def __init__(self, settings: Settings, pool: DevicePool) -> None:
        self._pool = pool

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await self._pool.start()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self._pool.close()
            await send({"type": "lifespan.shutdown.complete"})
            return
        status, text = await self._answer(scope, receive)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": text.encode()})

    async def _answer(self, scope, receive) -> tuple[int, str]:
        if scope["path"] == "/pid":
            return 200, str(os.getpid())
        if scope["path"] == "/torch":
            return 200, str("torch" in sys.modules)
        if scope["path"] == "/ready":
            states = [device.state for device in self._pool.devices()]
            return (200 if "ready" in states else 503), ",".join(states)
        body = b""
        while True:
            event = await receive()
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        pixels = np.frombuffer(body, dtype=np.uint8).reshape(SIDE, SIDE, 3)
        job = Job(
            id=uuid.uuid4().hex,
            operation="predict",
            model="fake",
            version="1",
            input=pixels,
            options=JobOptions(),
        )
        submission = Submission(
            job=job,
            deadline=time.monotonic() + 20,
            digest=hashlib.blake2b(body, digest_size=16).hexdigest(),
        )
        try:
            completion = await self._pool.submit(submission)
        except HeatlensError as error:
            return 500, error.code
        return 200, str(completion.outcome.predictions[0].class_id)


if __name__ == "__main__":
    sys.exit(http_process.main(make_app=SmallApp))
