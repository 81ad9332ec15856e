"""API keys and admin keys, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Literal

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from models.errors import AdminDisabled, Forbidden, Unauthorized
from service.api.dependencies import Service, ServiceDep
from service.settings import SecuritySettings

# Enough digits of a digest to tell configured keys apart; all processes share a small record.
_COUNTED_DIGITS = 16

_bearer = HTTPBearer(auto_error=False, description="`Authorization: Bearer KEY`")
_header = APIKeyHeader(name="X-API-Key", auto_error=False)


async def presented_key(
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    header: Annotated[str | None, Depends(_header)],
) -> str | None:
    """The key that a request presents, if any."""
    return bearer.credentials if bearer is not None else header


KeyDep = Annotated[str | None, Depends(presented_key)]


async def require_api_key(service: ServiceDep, key: KeyDep) -> None:
    """Let a request pass if no key is configured, or if it presents a configured one.

    Raises:
        Unauthorized: there is no key, or an unknown one.
    """
    security = service.settings.security
    if security.api_keys and not _is_one_of(key, _all_keys(security)):
        raise Unauthorized("A valid key is required.")


def may_pass(request: Request, security: SecuritySettings) -> bool:
    """Whether `require_api_key` lets a request pass."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        key = request.headers.get("x-api-key", "")
    return not security.api_keys or _is_one_of(key, _all_keys(security))


async def limit_key(service: ServiceDep, key: KeyDep) -> AsyncIterator[None]:
    """Count a request against its key while it is in flight; only configured keys are counted.

    Raises:
        Overloaded: the key has reached its limit.
    """
    limit = service.settings.limits.max_concurrent_per_key
    if limit is None or not _is_one_of(key, _all_keys(service.settings.security)):
        yield
        return
    with service.admission.key_slot(_hash(key or "")[-_COUNTED_DIGITS:], limit=limit):
        yield


async def require_operator_key(service: ServiceDep, key: KeyDep) -> None:
    """Let a request for documentation or metrics pass, if these are open or the key is right.

    Raises:
        Unauthorized: there is no key, or an unknown one.
    """
    if service.settings.security.operations == "key":
        await require_api_key(service, key)


async def access_of(request: Request, service: Service) -> Literal["none", "caller", "admin"]:
    """What a request may know that is answered in any case."""
    security = service.settings.security
    key = await presented_key(await _bearer(request), await _header(request))
    if _is_one_of(key, security.admin_keys):
        return "admin"
    known = security.operations == "open" or not security.api_keys
    return "caller" if known or _is_one_of(key, security.api_keys) else "none"


async def require_admin_key(service: ServiceDep, key: KeyDep) -> None:
    """Let a request pass if it presents an admin key.

    Raises:
        AdminDisabled: no admin key is configured.
        Unauthorized: there is no key, or an unknown one.
        Forbidden: the key is an API key.
    """
    security = service.settings.security
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
