"""JSON objects and the base64 in them, read from untrusted text and checked in our own words."""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from models.errors import BodyTooLarge, ImageUndecodable, InvalidOption, MalformedBody

OptionsT = TypeVar("OptionsT", bound=BaseModel)

# The most that a request needs: 16 interventions of 4,096 channels. A million empty lists are a
# megabyte of text, a hundred megabytes of objects, and a second in which nobody else is served.
_MAX_JSON_VALUES = 100_000

_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.+=-]+)*;base64,", re.ASCII)
# The URL-safe alphabet of base64 becomes the standard one; encoders like to break lines.
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\r\n"

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


def check_json_size(data: bytes, *, most: int) -> None:
    """Refuse JSON of very many values before it is parsed, which nothing interrupts.

    Raises:
        BodyTooLarge: it has more commas and opening brackets than `most`.
    """
    if len(data) > most and sum(map(data.count, (b",", b"[", b"{"))) > most:
        raise BodyTooLarge(f"The JSON has more than {most} values.")


def json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        MalformedBody: the text is not a JSON object.
        BodyTooLarge: it has too many values.
    """
    check_json_size(data, most=_MAX_JSON_VALUES)
    try:
        document = msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise MalformedBody("The JSON is malformed.") from error
    if not isinstance(document, dict):
        raise MalformedBody("The JSON is not an object.")
    return document


def decode_base64(text: str) -> bytes:
    """Decode base64 of either alphabet, padded or not, in one line or many, or a `data:` URL.

    Raises:
        ImageUndecodable: the text is something else, or cut off.
    """
    prefix = _DATA_URL.match(text[:256])
    try:
        coded = text[prefix.end() if prefix else 0 :].encode("ascii")
        digits = coded.translate(_STANDARD_ALPHABET, _WHITE_SPACE).rstrip(b"=")
        if not digits:
            raise ImageUndecodable("The base64 is empty.")
        if len(digits) % 4 == 1:
            raise ImageUndecodable("The base64 is cut off.")
        return binascii.a2b_base64(digits + b"=" * (-len(digits) % 4), strict_mode=True)
    except ValueError as error:  # covers binascii.Error and text that is not ASCII
        raise ImageUndecodable("The text has characters that are not base64.") from error


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
        return model.model_validate(values) if values != {} else _defaults(model)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = [prefix] if prefix else []
        field = ".".join([*path, *(str(part)[:_MAX_FIELD] for part in first["loc"])])
        raise InvalidOption(_explain(first, model), field=field or None) from None


@lru_cache
def _defaults(model: type[OptionsT]) -> OptionsT:
    """The options of a request that has none."""
    return model()


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
    # Raised by a validator of the model.
    if kind == "value_error":
        return str(context["error"])
    of_type = _TYPES.get(kind.partition("_")[0], "The value has the wrong type.")
    return _SENTENCES.get(kind, of_type).format(**context)
