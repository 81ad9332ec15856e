"""Heatlens as an application of Ray Serve: the same API, one device a replica.

serve run --app-dir deploy/ray_serve app:app                                    one CPU replica
serve run --app-dir deploy/ray_serve app:app config=/x/heatlens.toml gpus=1 max_replicas=8

A replica is the application of an HTTP process on a device in the same process: batching, deadlines
and admission are Heatlens's own (not `serve.batch`, which would put predictions and explanations
of different options together). Needs the extra `ray`.
"""

# Ray reads the annotation of `app`, so annotations are not postponed here.
from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application


class Arguments(BaseModel):
    """What `serve run` and the manifest may set.

    Attributes:
        config: a TOML file that every node has; None = `HEATLENS_*` variables, or the default model.
        gpus: GPUs of a replica, 0 or 1 (fractions share one).
        cpus: cores that Ray reserves for a replica.
        max_ongoing: requests that a replica takes at once: enough to fill batches while others are
            decoded and drawn.
    """

    model_config = ConfigDict(extra="forbid")

    config: Path | None = None
    gpus: float = 0
    cpus: float = 1
    min_replicas: int = 1
    max_replicas: int = 4
    max_ongoing: int = 32


@serve.deployment
@serve.ingress()
class Heatlens:
    """One replica."""

    def __init__(self, config: Path | None, gpus: float, cpus: float) -> None:
        from service.configuration import load_settings
        from service.worker.local import LocalPool

        class ReadyPool(LocalPool):
            """Takes requests only once every model was tried and one has answered."""

            async def start(self) -> None:
                await super().start()
                await self.wait_ready()

        self._settings = load_settings(
            config,
            overrides={
                "server": {"devices": ["cuda:0" if gpus else "cpu"]},
                "workers": {"threads": max(1, round(cpus))},
            },
        )
        self._pool = ReadyPool(self._settings, canary_s=self._settings.workers.canary_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray sends this replica's requests to; its lifespan starts and closes the pool."""
        from service.api.app import create_app

        return create_app(self._settings, self._pool)

    async def check_health(self) -> None:
        """Tell Ray to replace this replica when the service would not call itself ready."""
        from service.api.readiness import readiness

        found = readiness(self._pool, self._settings)
        if not found.ready:
            raise RuntimeError("; ".join(found.missing))


def app(arguments: Arguments) -> Application:
    """Build the application for `serve run app:app` and for a RayService."""
    return Heatlens.options(
        ray_actor_options={"num_gpus": arguments.gpus, "num_cpus": arguments.cpus},
        max_ongoing_requests=arguments.max_ongoing,
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            # A replica with more than this many requests has a queue on its device.
            "target_ongoing_requests": arguments.max_ongoing / 2,
        },
        # Longer than the deadline of any request, so that what was accepted is answered.
        graceful_shutdown_timeout_s=310,
    ).bind(arguments.config, arguments.gpus, arguments.cpus)
