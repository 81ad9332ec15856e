"""Loading one model on a device, with every way in which that can fail told apart."""

from __future__ import annotations

import logging

from models.catalog import ModelSpec
from models.errors import HeatlensError, ModelLoadFailed
from models.types import ModelCard
from service.workers.backend import Backend, DeviceLost
from service.workers.faults import classify
from service.workers.revision import with_revision

log = logging.getLogger("heatlens.compute")


def load_model(backend: Backend, spec: ModelSpec) -> ModelCard | HeatlensError:
    """Load, verify and warm a model, in the place of its name and version.

    Returns:
        Its card, or the error; what was raised, and the tensors in its traceback, is gone.

    Raises:
        DeviceLost: the device needs a new process.
    """
    try:
        return with_revision(backend.registry.load(spec)).card
    except HeatlensError as error:
        return type(error)(error.message, field=error.field)
    except Exception as error:
        fault = classify(error)
        log.exception("loading %s@%s failed: %s", spec.name, spec.version, fault)
        if fault == "device":
            raise DeviceLost("device error") from None
        if fault == "memory":
            backend.free_memory()
            return ModelLoadFailed("The device has no memory for the model.")
        return ModelLoadFailed("The model could not be loaded; the service's log says why.")
