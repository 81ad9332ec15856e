"""From the encoded images of a request to inputs of the model, within a budget of pixels and time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import msgspec
import numpy as np

from models.errors import HeatlensError, ImageTooLarge, InvalidOption, NotReady
from models.imaging.areas import draw_areas
from models.imaging.decode import DecodeLimits, from_pixels, inspect
from models.imaging.headers import Header
from models.imaging.prepare import Canvas, PreparedImage, from_decoded, is_light, prepare
from models.imaging.preprocess import take_normalised
from models.types import Preprocess
from service.api.decoders import Decoders
from service.api.host import HostWork
from service.api.plan import Plan

# Reading the headers of so many bytes takes less time than handing them to a thread.
_INLINE_BYTES = 256_000


class Preparation:
    """Prepares the images of requests.

    Attributes:
        limits: caps on images.
        host: has the threads where headers are read and images decoded.
        decoders: where images are decoded that are not proved to be cheap; None = where the others
            are.
        max_pixels: of all images of a request together.
    """

    def __init__(
        self,
        limits: DecodeLimits,
        *,
        host: HostWork,
        decoders: Decoders | None = None,
        max_pixels: float = math.inf,
    ) -> None:
        self.limits = limits
        self.host = host
        self.decoders = decoders
        self._max_pixels = max_pixels

    async def begin(self, plan: Plan) -> PlanInputs:
        """Look at the images of a plan.

        Raises:
            ImageTooLarge: they have too many pixels together.
        """
        images = [image.input.data for image in plan.images]
        files = [data for data in images if isinstance(data, bytes)]
        if sum(map(len, files)) <= _INLINE_BYTES:
            headers = [self._header(data) for data in images]
        else:
            headers = await self.host.inspect(lambda: [self._header(data) for data in images])
        if sum(header.pixels for header in headers if header) > self._max_pixels:
            raise ImageTooLarge(
                f"The images have more than {self._max_pixels} pixels together.", field="images"
            )
        return PlanInputs(self, plan, headers)

    def _header(self, data: bytes | np.ndarray) -> Header | None:
        try:
            return inspect(data, limits=self.limits) if isinstance(data, bytes) else None
        except HeatlensError:
            # Decoding raises it again, for this image alone.
            return None


class PlanInputs:
    """The images of one plan, each prepared when it is asked for.

    Args:
        preparation: where.
        plan: the plan.
        headers: of its images; None for what cannot be read, or needs no reading.
    """

    def __init__(
        self, preparation: Preparation, plan: Plan, headers: Sequence[Header | None]
    ) -> None:
        self._preparation = preparation
        self._plan = plan
        self._headers = headers
        # Images of others get their turn in the decoders between those of this plan.
        self._lane = asyncio.Semaphore(1)

    async def prepare(self, number: int) -> PreparedImage:
        """Prepare one image.

        Raises:
            HeatlensError: the image cannot be decoded, or only at too high a cost.
        """
        plan, header, host = self._plan, self._headers[number], self._preparation.host
        data, decoders = plan.images[number].input.data, self._preparation.decoders
        spec = plan.info.card.input
        if spec is None:
            raise NotReady("The model is not ready yet.", field="model")
        if decoders is None or header is None or is_light(header) or isinstance(data, np.ndarray):
            return await host.decode(
                lambda: self._with_areas(self._prepare(data, spec, header), number), piece=number
            )
        limits, canvas = self._preparation.limits, self._canvas
        async with self._lane:
            image = await decoders.prepare(
                data, header=header, limits=limits, spec=spec, canvas=canvas
            )
        if plan.images[number].areas:
            return await host.decode(lambda: self._with_areas(image, number), piece=number)
        return image

    def _with_areas(self, image: PreparedImage, number: int) -> PreparedImage:
        areas = self._plan.images[number].areas
        if not areas:
            return image
        return msgspec.structs.replace(image, areas=draw_areas(areas, image.geometry))

    @property
    def _draws(self) -> bool:
        return self._plan.operation in ("explain", "compare")

    @property
    def _canvas(self) -> Canvas:
        return self._plan.render.canvas if self._draws else "none"

    def _prepare(
        self, data: bytes | np.ndarray, spec: Preprocess, header: Header | None
    ) -> PreparedImage:
        limits, canvas = self._preparation.limits, self._canvas
        if isinstance(data, bytes):
            return prepare(data, limits=limits, spec=spec, canvas=canvas, header=header)
        if data.dtype != np.float32:
            image = from_pixels(data, limits=limits, preprocess=spec)
            return from_decoded(image, spec=spec, canvas=canvas)
        if self._draws and "overlay" in self._plan.render.outputs:
            reason = "Normalised values are not an image to draw an overlay on."
            raise InvalidOption(reason, field="outputs")
        values, geometry = take_normalised(data, spec)
        return PreparedImage(input=values, geometry=geometry)
