"""From an HTTP request to its response: read, plan, run, respond, unless the client disconnects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response

from models.errors import ERRORS, Cancelled, DeadlineExceeded, InternalError, ModelReplaced
from models.types import Operation
from service.api import schemas
from service.api.body import RequestBody
from service.api.dependencies import Service
from service.api.options import AnyOptions
from service.api.pipeline import Reply
from service.api.plan import Plan, choose_model, make_plan, timeout_s
from service.api.record import Served, record_of
from service.api.watch import Watch

_RETRIES = 3
_RETRY_PAUSE_S = 0.02
_RESPONSES: Mapping[Operation, Callable[..., Any]] = {
    "predict": schemas.PredictResponse,
    "explain": schemas.ExplainResponse,
    "features": schemas.FeaturesResponse,
    "compare": schemas.CompareResponse,
}

T = TypeVar("T")
OptionsT = TypeVar("OptionsT", bound=AnyOptions)


async def respond(request: Request, service: Service, options: type[OptionsT]) -> Response:
    """Read, plan and run a request, and respond with JSON.

    Raises:
        HeatlensError: the reason why it failed.
    """
    return images_response(request, *await run(request, service, options))


async def run(
    request: Request,
    service: Service,
    options: type[OptionsT],
    *,
    adapt: Callable[[Plan], Plan] = lambda plan: plan,
    watch: Watch | None = None,
) -> tuple[Plan, Reply]:
    """Read a request, with options of a type, and run it as `run_body` does."""
    started = time.monotonic()
    body = await in_time(service, service.reader.read(request, options))
    return await run_body(request, service, body, started=started, adapt=adapt, watch=watch)


async def in_time(service: Service, reading: Awaitable[T]) -> T:
    """Await a body, as long as a request may take.

    Raises:
        DeadlineExceeded: it did not arrive in time.
    """
    try:
        async with asyncio.timeout(service.settings.limits.timeout_s):
            return await reading
    except TimeoutError:
        raise DeadlineExceeded("The body did not arrive in time.") from None


async def run_body(
    request: Request,
    service: Service,
    body: RequestBody[OptionsT],
    *,
    started: float,
    adapt: Callable[[Plan], Plan] = lambda plan: plan,
    watch: Watch | None = None,
) -> tuple[Plan, Reply]:
    """Plan and run a request whose body is read; plan and run again if the model was replaced.

    `adapt` changes the plan before it is run.

    Raises:
        HeatlensError: the reason why it failed.
    """
    retries = _RETRIES
    while True:
        plan = adapt(_plan(request, service, body, started=started))
        try:
            return plan, await _run(request, service, plan, watch)
        except ModelReplaced:
            if not retries:
                raise
        retries -= 1
        # The new model's card is on its way to this process.
        await asyncio.sleep(_RETRY_PAUSE_S)


def images_response(request: Request, plan: Plan, reply: Reply) -> Response:
    """The JSON response to a request for images."""
    more = {"similarity": reply.similarity} if plan.operation == "compare" else {}
    return json_response(
        _RESPONSES[plan.operation](
            request_id=record_of(request).request_id,
            model=schemas.derive(schemas.ModelUsed, plan.info.card, device=reply.device),
            results=reply.results,
            timings_ms=reply.timings,
            batch_size=reply.batch_size,
            **more,
        )
    )


def good_results(reply: Reply) -> tuple[schemas.Result, ...]:
    """The results of all images, for protocols that have no place for the error of one.

    Raises:
        HeatlensError: the first one that an image failed with.
    """
    for result in reply.results:
        if result.error is not msgspec.UNSET:
            raise ERRORS.get(result.error.code, InternalError)(result.error.error)
    return reply.results


def json_response(body: Any, *, status: int = 200) -> Response:
    """Encode a struct of `service.api.schemas`, or a list of them, in one step."""
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work, but cancel it when the client disconnects. The body must have been read.

    Raises:
        Cancelled: the client disconnected first.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request))
    leaving.add_done_callback(lambda _: working.cancel())
    try:
        return await working
    except asyncio.CancelledError:
        # The request may be cancelled from outside as well.
        if leaving.done():
            raise Cancelled("The client disconnected before the response was ready.") from None
        raise
    finally:
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _plan(
    request: Request, service: Service, body: RequestBody[OptionsT], *, started: float
) -> Plan:
    options, limits = body.options, service.settings.limits
    seconds = timeout_s(options, request.headers.get("x-request-timeout-ms"), limits)
    info = choose_model(options.model, service.pool.models(), service.settings)
    record = record_of(request)
    record.images = len(body.images)
    record.served = Served(
        model=info.card.name, version=info.card.version, operation=options.operation
    )
    deadline = started + seconds
    known = service.pipeline.label_sets.has(info, getattr(options, "labels", ()))
    return make_plan(
        body.images,
        options,
        info,
        limits=limits,
        started=started,
        deadline=deadline,
        encodes=not known,
    )


async def _run(request: Request, service: Service, plan: Plan, watch: Watch | None) -> Reply:
    record = record_of(request)
    reply = await unless_gone(request, service.pipeline.run(plan, watch=watch))
    if record.served is not None:
        service.metrics.observe(reply, record.served)
    record.timings, record.batch_size = reply.timings, reply.batch_size
    return reply
