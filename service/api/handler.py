"""From an HTTP request to a reply: read, resolve, run, unless the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response

from models.errors import Cancelled, DeadlineExceeded, ModelReplaced
from models.types import ModelInfo
from service.api.body import Submission
from service.api.dependencies import Service
from service.api.metrics import Served
from service.api.options import AnyOptions
from service.api.pipeline import Reply
from service.api.plan import Plan, choose_model, make_plan, timeout_s
from service.api.schemas import ModelUsed

_ATTEMPTS = 4
_NEWS_S = 0.02

T = TypeVar("T")
OptionsT = TypeVar("OptionsT", bound=AnyOptions)


async def read(request: Request, service: Service, options: type[OptionsT]) -> Submission[OptionsT]:
    """Read a request's body and options; a body that trickles in is cut off.

    Raises:
        DeadlineExceeded: the body took longer than a request may.
        HeatlensError: what is wrong with it.
    """
    try:
        async with asyncio.timeout(service.settings.limits.timeout_s):
            return await service.reader.read(request, options)
    except TimeoutError:
        raise DeadlineExceeded("The body did not arrive in time.") from None


def plan(
    request: Request, service: Service, submission: Submission[OptionsT], *, started: float
) -> Plan:
    """Resolve a submission against the model it names.

    Args:
        request: for its timeout header, and for the access log.
        service: for its models and limits.
        submission: what was sent.
        started: monotonic time at which the request arrived.

    Raises:
        HeatlensError: what does not fit.
    """
    options, limits = submission.options, service.settings.limits
    seconds = timeout_s(options, request.headers.get("x-request-timeout-ms"), limits)
    info = choose_model(options.model, service.pool.models(), service.settings)
    request.state.log = {"model": info.card.name, "images": len(submission.images)}
    request.state.served = Served(
        model=info.card.name, version=info.card.version, operation=options.operation
    )
    return make_plan(
        submission.images,
        options,
        info,
        limits=limits,
        started=started,
        deadline=started + seconds,
    )


async def run(request: Request, service: Service, planned: Plan) -> Reply:
    """Run a plan, and count and log what it took.

    Raises:
        Cancelled: the client left.
        HeatlensError: why it failed.
    """
    reply = await unless_gone(request, service.pipeline.run(planned))
    service.metrics.observe(reply, request.state.served)
    request.state.timings = reply.timings
    request.state.log |= {"batch_size": reply.batch_size, "timings_ms": reply.timings}
    return reply


def _unchanged(planned: Plan) -> Plan:
    return planned


async def answer(
    request: Request,
    service: Service,
    options: type[OptionsT],
    *,
    adapt: Callable[[Plan], Plan] = _unchanged,
) -> tuple[Plan, Reply]:
    """Read, resolve and run; resolve and run again where the model was replaced meanwhile.

    Args:
        request: the request.
        service: what answers it.
        options: what it may ask for.
        adapt: changes the plan before it is run.

    Raises:
        HeatlensError: why it failed.
    """
    started = time.monotonic()
    submission = await read(request, service, options)
    for _ in range(_ATTEMPTS - 1):
        planned = adapt(plan(request, service, submission, started=started))
        try:
            return planned, await run(request, service, planned)
        except ModelReplaced:
            await asyncio.sleep(_NEWS_S)  # the new model's card is on its way to this process
    planned = adapt(plan(request, service, submission, started=started))
    return planned, await run(request, service, planned)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for work, but cancel it when the client disconnects. The body must have been read.

    Raises:
        Cancelled: the client disconnected first.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled("The client left before the answer.")
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---------------------------------------------------------------- answers


def json_response(answer: Any, *, status: int = 200) -> Response:
    """Encode an answer of `service.api.schemas`, or a list of them, in one step."""
    return Response(msgspec.json.encode(answer), status_code=status, media_type="application/json")


def model_used(info: ModelInfo, reply: Reply) -> ModelUsed:
    """The model that made a reply, as every answer names it."""
    card = info.card
    return ModelUsed(
        name=card.name,
        version=card.version,
        device=reply.device,
        precision=card.precision,
    )
