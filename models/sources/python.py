"""`python:module:factory` or `python:FILE:factory`: a user's own function that returns a network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from models.catalog import PreprocessSpec
from models.errors import ModelLoadFailed
from models.sources import USUAL_PREPROCESS, BuildRequest, Built
from models.sources.project import import_from
from models.types import Preprocess


def build(request: BuildRequest) -> Built:
    """Call the factory, with `num_classes` if it is configured and the factory takes it.

    The module is imported from the configuration's folder if it is there, else as usual; a file from
    its own folder. The factory
    returns a network, or (network, {"preprocess": {…}, "labels": […]}), where `preprocess` has the
    fields of `[models.preprocess]` and labels may be left out.

    Raises:
        ModelLoadFailed: no such module or function, it raised, or it returned something else.
    """
    factory = _factory(request)
    try:
        made = factory(**_arguments(factory, request))
    except Exception as error:
        raise ModelLoadFailed(f"The factory {request.name} raised an error.") from error
    module, facts = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
    # What torch.compile wraps is served by itself: compiling would take minutes.
    module = getattr(module, "_orig_mod", module)
    if not isinstance(module, nn.Module) or not isinstance(facts, Mapping):
        raise ModelLoadFailed(
            f"The factory {request.name} returned neither a torch.nn.Module nor a pair of one "
            "and a dictionary."
        )
    return Built(
        module=module,
        preprocess=_preprocess(facts, request),
        assumed_preprocess="preprocess" not in facts,
        labels=_labels(facts),
    )


def _factory(request: BuildRequest) -> Callable[..., Any]:
    path, _, attribute = request.name.rpartition(":")
    if not path or not attribute:
        raise ModelLoadFailed(
            "A python source is written python:package.module:factory or python:file.py:factory."
        )
    root, name = request.base_dir, path
    if path.endswith(".py"):
        # As for a script, what the file imports is looked for beside it.
        root, name = (request.base_dir / path).parent, Path(path).stem
    try:
        module = import_from(root, name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise ModelLoadFailed(
                f"The module {path} is not found, neither installed nor beside the configuration."
            ) from error
        raise ModelLoadFailed(f"A module that {path} imports is not found.") from error
    except Exception as error:
        raise ModelLoadFailed(f"Importing the module {path} raised an error.") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ModelLoadFailed(f"The module {path} has no function {attribute}.")
    return factory  # type: ignore[no-any-return]


def _arguments(factory: Callable[..., Any], request: BuildRequest) -> dict[str, Any]:
    if request.num_classes is None:
        return {}
    parameters = inspect.signature(factory).parameters.values()
    takes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    return {"num_classes": request.num_classes} if takes else {}


def _preprocess(facts: Mapping[str, Any], request: BuildRequest) -> Preprocess:
    try:
        return PreprocessSpec.model_validate(facts.get("preprocess", {})).over(USUAL_PREPROCESS)
    except ValidationError as error:
        raise ModelLoadFailed(
            f"The preprocess that the factory {request.name} returned is not valid: it may have "
            f"{', '.join(PreprocessSpec.model_fields)}."
        ) from error


def _labels(facts: Mapping[str, Any]) -> tuple[str, ...] | None:
    labels = facts.get("labels")
    return None if labels is None else tuple(map(str, labels))
