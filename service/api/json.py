"""JSON objects and the base64 in them, read from untrusted text."""

from __future__ import annotations

import binascii
import re
from typing import Any

import msgspec

from models.errors import BodyTooLarge, ImageUndecodable, MalformedBody

# The most that a request needs: 16 interventions of 4,096 channels. A million empty lists are a
# megabyte of text, a hundred megabytes of objects, and a second in which nobody else is served.
_MAX_JSON_VALUES = 100_000

_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.+=-]+)*;base64,", re.ASCII)
# The URL-safe alphabet of base64 becomes the standard one; encoders like to break lines.
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\r\n"


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
