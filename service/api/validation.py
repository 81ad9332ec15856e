"""Checks values against a model of options; the errors are in our own words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from models.errors import InvalidOption

OptionsT = TypeVar("OptionsT", bound=BaseModel)

# Characters of a name of the client's own that an error repeats.
_MAX_FIELD = 64

_TYPES: Mapping[str, str] = {
    "bool": "Must be true or false.",
    "int": "Must be an integer.",
    "float": "Must be a number.",
    "string": "Must be text.",
    "list": "Must be a list.",
    "dict": "Must be an object.",
    "model": "Must be an object.",
}
_SENTENCES: Mapping[str, str] = {
    "missing": "This is required.",
    "finite_number": "Must be a finite number.",
    "greater_than": "Must be greater than {gt}.",
    "greater_than_equal": "Must be at least {ge}.",
    "less_than_equal": "Must be at most {le}.",
    "too_short": "Must have at least {min_length} item(s).",
    "too_long": "Must have at most {max_length} items.",
    "string_too_short": "Must not be empty.",
    "string_too_long": "Must be at most {max_length} characters long.",
}


def validate(model: type[OptionsT], values: Mapping[str, Any], *, prefix: str = "") -> OptionsT:
    """Check options.

    Args:
        model: the options of the operation.
        values: the values sent.
        prefix: path of `values` in the request, for errors.

    Raises:
        InvalidOption: a value is wrong; the error names the first field and its allowed values.
    """
    if isinstance(values, Mapping):
        _check_names(model, values, prefix)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = [prefix] if prefix else []
        field = ".".join([*path, *(str(part)[:_MAX_FIELD] for part in first["loc"])])
        raise InvalidOption(_explain(first, model), field=field or None) from None


def _check_names(model: type[BaseModel], values: Mapping[str, Any], prefix: str) -> None:
    """Refuse the first unknown option; the library would describe each of a hundred thousand."""
    for name in values:
        if name not in model.model_fields:
            field = f"{prefix}.{name[:_MAX_FIELD]}".removeprefix(".")
            allowed = ", ".join(model.model_fields)
            text = "Unknown key." if prefix else f"Unknown option. Allowed: {allowed}."
            raise InvalidOption(text, field=field)


def _explain(error: ErrorDetails, model: type[BaseModel]) -> str:
    """Describe a validation error in our own words."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        return f"Allowed values: {', '.join(allowed)}."
    if kind == "extra_forbidden":
        if len(error["loc"]) > 1:
            return "Unknown key."
        return f"Unknown option. Allowed: {', '.join(model.model_fields)}."
    # Raised by a validator of this file.
    if kind == "value_error":
        return str(context["error"])
    of_type = _TYPES.get(kind.partition("_")[0], "The value has the wrong type.")
    return _SENTENCES.get(kind, of_type).format(**context)
