"""The batching, admission and routing of the service on many devices, by simulation.

    python -m benchmarks.simulate
    python -m benchmarks.simulate --curve a100 --devices 1,64,512 --arrivals bursty --deaths

The `Batcher` is the service's own, under a clock that jumps from event to event; jobs go to the
device where they wait least by estimate, as in `SocketPool`. The same arrivals are given to three other
policies, on the same devices with the same routing: a fixed window (LitServe, TorchServe), a short
delay (Triton's dynamic batcher) and Clipper's AIMD. These run long jobs to their end, queue without
a limit, and lose what a device had when it dies. With `--line` Heatlens refuses by the wait of all requests
together first, as an HTTP process does (`service.api.admission.Line`).

An answer is good if it comes before its deadline. Latencies are of good and late answers of single
passes; `long` is the share of long jobs that ended in time.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.policies import PATIENCE, STEP_IMAGES, STEPS, Policy, Request, policies
from models.errors import HeatlensError, Overloaded
from models.shares import shared_wait
from service.api.admission import Line
from service.cli.bench.load import percentile

Act = Callable[[float], None]
Death = tuple[float, int, float]
"""Its time, the device's number, and the seconds until it is back."""

CURVES = {
    # EfficientNet-Lite0 by the service's engine on one core of an AMD EPYC (AVX-512, bf16).
    "fp32": {1: 16.5, 2: 30.0, 4: 56.5, 8: 118.2, 16: 223.5},
    "bf16": {1: 12.3, 2: 20.6, 4: 34.9, 8: 70.7, 16: 133.2},
    # EfficientNet-B0 on an A100 80GB in TF32, PyTorch 21.03: batch over throughput, from NVIDIA's
    # DeepLearningExamples, PyTorch/Classification/ConvNets/efficientnet/README.md.
    "a100": {1: 7.7, 2: 7.6, 4: 8.0, 8: 8.0, 16: 8.5, 32: 9.4, 64: 13.7, 128: 25.6},
    # ResNet-50 on an H100 SXM in INT8 by TensorRT, MLPerf Inference v4.1: batches of 1 and 8 as
    # NVIDIA configures single-stream and multi-stream, then on a line to Dell's offline result
    # (eight of them, batches of 2048: 709,849 images/s).
    "h100": {1: 0.66, 2: 0.68, 4: 0.73, 8: 0.83, 16: 0.92, 32: 1.09, 64: 1.44, 128: 2.14},
}
LONG_SHARE = 0.005
EXTRA = 0.05
DEADLINE_PASSES = 100
_RETRY_S = 0.1


@dataclass(eq=False)
class Device:
    """A device of the simulation; `deaths` tells late events."""

    policy: Policy
    busy: bool = False
    alive: bool = True
    deaths: int = 0
    assigned: dict[int, float] = field(default_factory=dict)
    work: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})

    def wait(self, *, long: bool) -> float:
        """What a new job would wait for, as `WorkerConnection.wait_ms` estimates it."""
        return shared_wait(self.work[long], self.work[not long], long=long)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a policy made of the arrivals."""

    good: float
    refused: float
    long: float
    p50_ms: float
    p99_ms: float


def arrivals(kind: str, rate: float, count: int, seed: int = 0) -> Iterator[float]:
    """Times of requests: `poisson`, `bursty` (a second in four has 2.5 times the mean) or `diurnal`."""
    chance, now = random.Random(seed), 0.0
    span = count / rate
    shapes: dict[str, Callable[[float], float]] = {
        "poisson": lambda _: 1.0,
        "bursty": lambda t: 2.5 if t % (span / 5) < span / 20 else 0.5,
        "diurnal": lambda t: 1 - 0.8 * math.cos(2 * math.pi * t / span),
    }
    for _ in range(count):
        now += chance.expovariate(rate * max(0.05, shapes[kind](now)))
        yield now


def requests(
    times: Iterator[float], *, deadline_s: float, unit_ms: float, seed: int = 1
) -> list[Request]:
    """Half predictions, half explanations, one long job in two hundred."""
    chance = random.Random(seed)
    return [
        Request(
            number=number,
            arrived=at,
            deadline=at + deadline_s * (10 if long else 1),
            extra_ms=EXTRA * unit_ms if chance.random() < 0.5 else 0.0,
            long=long,
        )
        for number, at in enumerate(times)
        for long in [chance.random() < LONG_SHARE]
    ]


class Simulation:
    """Runs jobs on devices, from one event to the next.

    Args:
        devices: they take jobs from now on.
        max_wait_s: of the line of single passes; None = there is none.
        pass_ms: device time of one of them.
    """

    def __init__(
        self, devices: Sequence[Device], *, max_wait_s: float | None = None, pass_ms: float = 0.0
    ) -> None:
        self._devices = devices
        self._now, self._max_wait_s, self._pass_ms = 0.0, max_wait_s or 0.0, pass_ms
        self._line = None
        if max_wait_s is not None:
            self._line = Line(max_wait_s=max_wait_s, clock=lambda: self._now)
        self._places: dict[int, contextlib.ExitStack] = {}
        self._order = itertools.count()
        self._events: list[tuple[float, int, Act]] = []
        self.refused = 0

    def run(self, jobs: Sequence[Request], *, deaths: Sequence[Death] = ()) -> Outcome:
        """What becomes of the jobs."""
        for job in jobs:
            self._at(job.arrived, partial(self._arrive, job))
        for when, number, pause_s in deaths:
            self._at(when, partial(self._die, self._devices[number], pause_s))
        while self._events:
            self._now, _, act = heapq.heappop(self._events)
            act(self._now)
        return outcome(jobs, refused=self.refused)

    def _at(self, when: float, act: Act) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    def _arrive(self, request: Request, now: float) -> None:
        place = self._places[request.number] = contextlib.ExitStack()
        if self._line and not request.long:
            try:
                self._line.check(self._line.wait_s, patience_s=self._max_wait_s)
            except Overloaded:
                self.refused += 1
                return
            place.enter_context(self._line.place(self._pass_ms + request.extra_ms))
        self._route(request, now)

    def _route(self, request: Request, now: float) -> None:
        alive = [device for device in self._devices if device.alive]
        if not alive:
            self._at(now + _RETRY_S, partial(self._route, request))
            return
        device = min(alive, key=lambda d: d.wait(long=request.long))
        if not device.policy.add(request, now):
            self.refused += 1
            self._leave(request, failed=True)
            return
        device.assigned[request.number] = request.work
        device.work[request.long] += request.work
        self._serve(device, now)

    def _serve(self, device: Device, now: float) -> None:
        if device.busy or not device.alive:
            return
        found = device.policy.next(now)
        if isinstance(found, tuple):
            batch, taken_ms = found
            device.busy = True
            ended = partial(self._finish, device, device.deaths, batch, taken_ms)
            self._at(now + taken_ms / 1000, ended)
        elif found is not None:
            self._at(found, partial(self._serve, device))

    def _finish(
        self, device: Device, deaths: int, batch: list[Request], taken_ms: float, now: float
    ) -> None:
        if deaths != device.deaths:
            return
        device.busy = False
        for request in device.policy.done(batch, now, taken_ms):
            request.ended = now
            self._leave(request)
            device.work[request.long] -= device.assigned.pop(request.number, 0.0)
        self._serve(device, now)

    def _leave(self, request: Request, *, failed: bool = False) -> None:
        with contextlib.suppress(HeatlensError), self._places.pop(request.number):
            if failed:
                raise Overloaded("It is refused.")

    def _die(self, device: Device, pause_s: float, now: float) -> None:
        device.alive, device.busy = False, False
        device.work = dict.fromkeys(device.work, 0.0)
        device.deaths += 1
        device.assigned.clear()
        self._at(now + pause_s, partial(self._revive, device))
        for request in device.policy.drop():
            self._route(request, now)

    def _revive(self, device: Device, now: float) -> None:
        device.alive = True
        self._serve(device, now)


def outcome(jobs: Sequence[Request], *, refused: int) -> Outcome:
    """Reduce jobs to numbers."""
    short, long = ([job for job in jobs if job.long is kind] for kind in (False, True))
    answered = [1000 * (job.ended - job.arrived) for job in short if job.ended < math.inf]
    return Outcome(
        good=sum(job.ended <= job.deadline for job in short) / max(1, len(short)),
        refused=refused / max(1, len(jobs)),
        long=sum(job.ended <= job.deadline for job in long) / max(1, len(long)),
        p50_ms=percentile(answered, 50),
        p99_ms=percentile(answered, 99),
    )


def compare(
    curve: Mapping[int, float],
    number: int,
    kind: str,
    load: float,
    *,
    count: int,
    deaths: bool = False,
    has_line: bool = False,
) -> dict[str, Outcome]:
    """The same arrivals under every policy, at a share of what the devices can do."""
    unit_ms = min(ms / size for size, ms in curve.items())
    deadline_s = DEADLINE_PASSES * curve[1] / 1000
    mean_ms = unit_ms * (1 + 0.5 * EXTRA + LONG_SHARE * STEPS * STEP_IMAGES)
    rate = load * number * 1000 / mean_ms
    span = count / rate
    dying = [(span * (0.3 + 0.2 * n / number), n, span / 5) for n in range(0, number, 4)]
    found = {}
    # A device refuses at twice the limit what the line has let in.
    patience = 2 * PATIENCE if has_line else PATIENCE
    for name, make in policies(curve, deadline_s, patience=patience).items():
        jobs = requests(arrivals(kind, rate, count), deadline_s=deadline_s, unit_ms=unit_ms)
        line_s = PATIENCE * deadline_s if has_line and name == "Heatlens" else None
        devices = [Device(make()) for _ in range(number)]
        simulation = Simulation(devices, max_wait_s=line_s, pass_ms=unit_ms)
        found[name] = simulation.run(jobs, deaths=dying if deaths else ())
    return found


def main(
    *,
    curve: Annotated[str, typer.Option(help="fp32, bf16, a100 or h100.")] = "fp32",
    devices: Annotated[str, typer.Option(help="Numbers, comma-separated.")] = "1,8,64",
    loads: Annotated[str, typer.Option(help="Shares of the capacity.")] = "0.5,0.9,1.5",
    kinds: Annotated[
        str, typer.Option("--arrivals", help="Of poisson, bursty, diurnal.")
    ] = "poisson,bursty",
    count: Annotated[int, typer.Option("--requests", help="Of each case.")] = 5000,
    deaths: Annotated[
        bool, typer.Option("--deaths", help="Every fourth device dies once.")
    ] = False,
    has_line: Annotated[
        bool, typer.Option("--line", help="Heatlens also refuses by the line of all requests.")
    ] = False,
) -> None:
    """Simulate every case and print one table."""
    columns = ("good", "p50 ms", "p99 ms", "refused", "long")
    table = Table("devices", "arrivals", "load", "policy", *columns, box=box.MARKDOWN)
    cases = itertools.product(devices.split(","), kinds.split(","), loads.split(","))
    for number, kind, load in cases:
        found = compare(
            CURVES[curve],
            int(number),
            kind,
            float(load),
            count=count,
            deaths=deaths,
            has_line=has_line,
        )
        for name, row in found.items():
            cells = (f"{row.good:.1%}", f"{row.p50_ms:.1f}", f"{row.p99_ms:.1f}")
            table.add_row(
                number, kind, f"{float(load):.0%}", name, *cells, f"{row.refused:.1%}", f"{row.long:.0%}"
            )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
