"""Long fuzzing with counts: mutated images through the decoder, generated requests through the real engine.

python -m tests.hostile.fuzz --images 50000 --requests 20000
"""

from __future__ import annotations

import argparse
import base64
import os
import random
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from models.errors import HeatlensError
from models.imaging.decode import DecodeLimits
from models.imaging.prepare import prepare
from models.types import Preprocess
from tests.hostile.pictures import mutated, seeds
from tests.waiting import until

SPEC = Preprocess(resize=256, crop=(224, 224))
PNG = seeds()["png"]
B64 = base64.b64encode(PNG).decode()
_CHUNK = 1000
_SLOW_S = 1.0
# The deadline of a generated request may be a millisecond; a device may be at its limit.
_FINE = frozenset((429, 503, 504))


def decode_mutated(number: int) -> Counter[str]:
    """How a thousand mutated images end; also those that take a second or more."""
    chosen, ends = random.Random(number), Counter[str]()
    for _ in range(_CHUNK):
        _, data = mutated(chosen)
        began = time.process_time()
        try:
            prepare(data, limits=DecodeLimits(), spec=SPEC, canvas="original")
            ends["decoded"] += 1
        except HeatlensError as error:
            ends[error.code] += 1
        except Exception as error:  # noqa: BLE001 # what this looks for
            ends[f"FAULT {type(error).__name__}"] += 1
        if time.process_time() - began > _SLOW_S:
            ends["FAULT slow"] += 1
    return ends


def fuzz_images(count: int) -> Counter[str]:
    """Decode mutated images in two processes; a crash ends the run."""
    with ProcessPoolExecutor(2, initializer=_be_quiet) as processes:
        return sum(processes.map(decode_mutated, range(-(-count // _CHUNK))), Counter[str]())


def _be_quiet() -> None:
    """Libraries write a line for each fault that they find."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@contextmanager
def serving() -> Iterator[str]:
    """The service with the embedded model; yields its address, and checks that nothing died."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "service", "serve", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: _readiness(url).get("ready"), timeout_s=120, every_s=0.5)
            yield url
            restarts = [device["restarts"] for device in _readiness(url)["devices"]]
            assert not any(restarts), f"device workers were restarted: {restarts}"
        finally:
            process.terminate()


def _readiness(url: str) -> dict[str, Any]:
    try:
        return httpx.get(f"{url}/readyz", timeout=30).json()
    except httpx.TransportError:
        return {}


@schemathesis.serializer(
    "image/bmp", "image/tiff", "image/webp", "image/gif", "image/png", "image/jpeg"
)
def serialize_image(_: Any, value: Any) -> bytes:
    """An image is generated as a string of any bytes."""
    return value if isinstance(value, bytes) else str(value).encode()


def fuzz_requests(url: str, count: int) -> Counter[str]:
    """Send requests that the OpenAPI document allows, half of those for images with a real one."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    ends = Counter[str]()

    def send(case: schemathesis.Case, with_image: bool) -> None:
        if with_image and case.media_type == "application/json" and isinstance(case.body, dict):
            case.body = {**case.body, "images": [{"b64": B64}], "timeout_s": 5}
        elif with_image and case.media_type and case.media_type.startswith("image/"):
            case.body = PNG
        response = case.call(timeout=60)
        status = response.status_code
        ends["FAULT " * (status >= 500 and status not in _FINE) + str(status)] += 1

    # Operations without options have few requests; the others make up for them, in further rounds.
    rounds = 0
    while (missing := count - ends.total()) > 0:
        share = -(-missing // len(operations))
        for number, operation in enumerate(operations):

            @seed(number + len(operations) * rounds)
            @settings(
                max_examples=share,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(), with_image=st.booleans())
            def run(case: schemathesis.Case, with_image: bool) -> None:
                send(case, with_image)

            run()
        rounds += 1
    return ends


def main() -> int:
    """Fuzz, print the counts, and tell by the exit code whether there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--requests", type=int, default=20_000)
    options = parser.parse_args()
    faults = 0
    if options.images:
        began, ends = time.monotonic(), fuzz_images(options.images)
        faults += _show("mutated images", ends, time.monotonic() - began)
    if options.requests:
        with serving() as url:
            began, ends = time.monotonic(), fuzz_requests(url, options.requests)
            faults += _show("generated requests", ends, time.monotonic() - began)
    return int(faults > 0)


def _show(what: str, ends: Counter[str], seconds: float) -> int:
    total = sum(n for end, n in ends.items() if end != "FAULT slow")
    counts = ", ".join(f"{end}: {n:,}" for end, n in ends.most_common())
    print(f"{total:,} {what} in {seconds:.0f} s: {counts}", flush=True)
    return sum(n for end, n in ends.items() if end.startswith("FAULT"))


if __name__ == "__main__":
    sys.exit(main())
