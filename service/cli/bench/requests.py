"""The requests that are sent, ready as bytes: nothing is encoded while the clock runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from urllib.parse import urlencode

from models.types import Struct
from service.cli.bench.address import Address


class BenchOperation(StrEnum):
    """An endpoint below `/v1` that takes pictures."""

    EXPLAIN = "explain"
    PREDICT = "predict"
    FEATURES = "features"


class Request(Struct):
    """An HTTP/1.1 request in two parts, between which the request's id is put.

    Attributes:
        picture: number of the picture that it carries.
        before: request line and headers up to the value of `X-Request-ID`.
        after: the rest, body included.
    """

    picture: int
    before: bytes
    after: bytes

    def with_id(self, request_id: str) -> bytes:
        """The bytes to send."""
        return b"".join((self.before, request_id.encode("ascii"), self.after))


def make_request(
    address: Address,
    path: str,
    body: bytes,
    *,
    picture: int = 0,
    content_type: str = "application/octet-stream",
    headers: Mapping[str, str] | None = None,
    method: str = "POST",
) -> Request:
    """Lay out one request; `path` begins with a slash and may hold a query."""
    lines = [
        f"{method} {address.path}{path} HTTP/1.1",
        f"Host: {address.authority}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
        "X-Request-ID: ",
    ]
    before = "\r\n".join(lines).encode("latin-1")
    return Request(picture=picture, before=before, after=b"\r\n\r\n" + body)


def picture_requests(
    address: Address,
    pictures: Sequence[bytes],
    *,
    operation: BenchOperation = BenchOperation.EXPLAIN,
    options: Mapping[str, str] | None = None,
    key: str | None = None,
) -> list[Request]:
    """One request for each encoded picture, sent as a raw body with its options in the query.

    Args:
        address: the service.
        pictures: encoded pictures of any kind that the service reads.
        operation: endpoint below `/v1`.
        options: of the API, such as `{"methods": "gradcam,layercam"}`.
        key: sent as a bearer token.
    """
    query = f"?{urlencode(options)}" if options else ""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return [
        make_request(address, f"/v1/{operation}{query}", data, picture=i, headers=headers)
        for i, data in enumerate(pictures)
    ]
