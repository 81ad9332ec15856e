"""API keys and admin keys, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator, Sequence
from typing import Literal

from fastapi import Request

from models.errors import AdminDisabled, Forbidden, Unauthorized
from service.api.dependencies import Service, service_of
from service.settings import SecuritySettings

# Enough digits of a digest to tell configured keys apart; all processes share a small record.
_COUNTED_DIGITS = 16


def presented_key(request: Request) -> str | None:
    """The key that a request presents, if any."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return request.headers.get("x-api-key")


async def admit(request: Request) -> None:
    """Let a request for images pass if its key is right and the service is not at its limit.

    Its body is not read.

    Raises:
        Unauthorized: there is no key, or an unknown one.
        Overloaded: it would wait for too long.
    """
    await require_api_key(request)
    service_of(request).admission.check_unread(request)


async def require_api_key(request: Request) -> None:
    """Let a request pass if no key is configured, or if it presents a configured one.

    Raises:
        Unauthorized: there is no key, or an unknown one.
    """
    if not may_pass(request, service_of(request).settings.security):
        raise Unauthorized("A valid key is required.")


def may_pass(request: Request, security: SecuritySettings) -> bool:
    """Whether `require_api_key` lets a request pass."""
    return not security.api_keys or _is_one_of(presented_key(request), _all_keys(security))


async def limit_key(request: Request) -> AsyncIterator[None]:
    """Count a request against its key while it is in flight; only configured keys are counted.

    Raises:
        Overloaded: the key has reached its limit.
    """
    service, key = service_of(request), presented_key(request)
    limit = service.settings.limits.max_concurrent_per_key
    if limit is None or not _is_one_of(key, _all_keys(service.settings.security)):
        yield
        return
    with service.admission.key_slot(_hash(key or "")[-_COUNTED_DIGITS:], limit=limit):
        yield


async def require_operator_key(request: Request) -> None:
    """Let a request for documentation or metrics pass, if these are open or the key is right.

    Raises:
        Unauthorized: there is no key, or an unknown one.
    """
    if service_of(request).settings.security.operations == "key":
        await require_api_key(request)


def access_of(request: Request, service: Service) -> Literal["none", "caller", "admin"]:
    """What a request may know that is answered in any case."""
    security = service.settings.security
    key = presented_key(request)
    if _is_one_of(key, security.admin_keys):
        return "admin"
    known = security.operations == "open" or not security.api_keys
    return "caller" if known or _is_one_of(key, security.api_keys) else "none"


async def require_admin_key(request: Request) -> None:
    """Let a request pass if it presents an admin key.

    Raises:
        AdminDisabled: no admin key is configured.
        Unauthorized: there is no key, or an unknown one.
        Forbidden: the key is an API key.
    """
    security, key = service_of(request).settings.security, presented_key(request)
    if not security.admin_keys:
        raise AdminDisabled("Administration is disabled: no admin key is configured.")
    if _is_one_of(key, security.admin_keys):
        return
    if _is_one_of(key, security.api_keys):
        raise Forbidden("This requires an admin key.")
    raise Unauthorized("A valid key is required.")


def _all_keys(security: SecuritySettings) -> list[str]:
    return [*security.api_keys, *security.admin_keys]


def _is_one_of(key: str | None, hashes: Sequence[str]) -> bool:
    """Compare a key with every hash, so that the time taken reveals nothing."""
    if not key:
        return False
    digest = _hash(key)
    return sum(hmac.compare_digest(digest, known) for known in hashes) > 0


def _hash(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()
