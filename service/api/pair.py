"""Two images that are compared: one job brings both, and each takes its half of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
from msgspec import structs

from models.errors import HeatlensError
from models.price import Price, price
from models.types import JobOptions, ModelInfo
from service.devices.messages import Completion, Submission


class Pair:
    """Submits the job of two images once both are decoded."""

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self._other: asyncio.Future[np.ndarray] = asyncio.Future()
        self._completion: asyncio.Future[Completion] = asyncio.Future()

    async def run(
        self,
        number: int,
        submission: Submission,
        submit: Callable[[Submission], Awaitable[Completion]],
    ) -> Completion:
        """Submit the job with the first image, and return the answer for this one.

        Raises:
            HeatlensError: the other image failed.
        """
        if number == 0:
            job = structs.replace(submission.job, other=await self._other)
            both = _price_of_both(submission.price, self._info)
            completion = await submit(structs.replace(submission, job=job, price=both))
            if not self._completion.done():
                self._completion.set_result(completion)
        elif not self._other.done():
            self._other.set_result(submission.job.input)
        completion = await self._completion
        explanations = completion.outcome.explanations
        half = len(explanations) // 2
        own = explanations[half:] if number else explanations[:half]
        outcome = structs.replace(completion.outcome, explanations=own)
        return structs.replace(completion, outcome=outcome)

    def fail(self, error: HeatlensError) -> None:
        """End the comparison: both images fail."""
        for future in (self._other, self._completion):
            if not future.done():
                future.set_exception(error)
                # It is no loss if nobody waits for it.
                future.exception()

    @property
    def similarity(self) -> float:
        """Cosine of the two vectors, 0 where one is zero."""
        score = self._completion.result().outcome.predictions[0].score
        return min(1.0, max(-1.0, score))


def _price_of_both(one: Price, info: ModelInfo) -> Price:
    """The price of the job, by that of each image; two images are in its first pass."""
    return structs.replace(
        one,
        device_ms=2 * one.device_ms,
        extra_ms=2 * one.extra_ms + price("predict", JobOptions(), info).device_ms,
        device_bytes=2 * one.device_bytes,
        result_bytes=2 * one.result_bytes,
    )
