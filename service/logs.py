"""Logs as JSON lines, one object per event, and the request ids that they carry."""

from __future__ import annotations

import datetime
import logging
import re
import secrets
import sys
import time
from contextvars import ContextVar
from typing import Any, TextIO

import msgspec

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that the running task handles; empty outside of requests."""

_SAFE_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}", re.ASCII)
_CROCKFORD_BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def request_id_of(inbound: str | None) -> str:
    """Keep an inbound id that is safe in a header and a log line; otherwise make a new one."""
    return inbound if inbound and _SAFE_ID.fullmatch(inbound) else new_id()


def new_id() -> str:
    """A ULID: 48 bits of milliseconds and 80 random bits as 26 characters."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join(_CROCKFORD_BASE32[number >> shift & 31] for shift in range(125, -1, -5))


class JsonFormatter(logging.Formatter):
    """Formats a record as JSON: its usual fields, the request id and `extra={"fields": …}`."""

    def format(self, record: logging.LogRecord) -> str:
        """Encode a record."""
        moment = datetime.datetime.fromtimestamp(record.created, tz=datetime.UTC)
        event: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        if request_id.get():
            event["request_id"] = request_id.get()
        event |= getattr(record, "fields", {})
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(event, enc_hook=str).decode()


def configure_logging(level: str, *, stream: TextIO | None = None) -> None:
    """Write all logs of this process as JSON lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Warnings of libraries are lines of JSON, too, and each is told once.
    logging.captureWarnings(True)
    # The middleware writes the access log; lines of the client library would repeat URLs.
    for name in ("uvicorn.access", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
