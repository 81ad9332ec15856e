"""Two images that are compared: each needs the vector of the other."""

from __future__ import annotations

import asyncio

import numpy as np

from models.errors import HeatlensError, InternalError


class Pair:
    """Hands each of two images the vector of the other, or its error."""

    def __init__(self) -> None:
        self._vectors: list[asyncio.Future[np.ndarray]] = [asyncio.Future(), asyncio.Future()]

    async def exchange(self, number: int, vector: np.ndarray | None) -> np.ndarray:
        """Give the vector of one image, and wait for that of the other.

        Raises:
            HeatlensError: the other image failed.
        """
        if vector is None:
            raise InternalError("The model gave no vector.")
        # The other image may have failed.
        if not self._vectors[number].done():
            self._vectors[number].set_result(vector)
        return await self._vectors[1 - number]

    def fail(self, error: HeatlensError) -> None:
        """End the exchange: of two images that are compared, both fail."""
        for vector in self._vectors:
            if not vector.done():
                vector.set_exception(error)
                # It is no loss if nobody waits for it.
                vector.exception()

    @property
    def similarity(self) -> float:
        """Cosine of the two vectors, 0 where one is zero."""
        one, other = (vector.result().astype(np.float64) for vector in self._vectors)
        size = float(np.linalg.norm(one) * np.linalg.norm(other))
        return float(np.clip(one @ other / size, -1.0, 1.0)) if size else 0.0
