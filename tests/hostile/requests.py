"""Bad requests, made by code for every route that the application has, those of dialects included."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from tests.hostile.pictures import bad_pictures, seeds

JSON = "application/json"
FORM = "multipart/form-data; boundary=b"
BYTES = "application/octet-stream"


@dataclass(frozen=True)
class Bad:
    """A request that must be refused: with a status below 500, unless it says otherwise."""

    name: str
    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[object, ...]:
        return self.method, self.path, self.body, tuple(sorted(self.headers.items()))


PNG = seeds()["png"]
B64 = base64.b64encode(PNG).decode()

# What is in the place of a name in a path.
NAMES = (
    "%00",
    "%0d%0aX-Injected:%201",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e",
    "a" * 3000,
    "%ff%fe",
    "%F0%9F%90%88",
    "@",
    "a@b@c",
    "*",
    "%3Cscript%3E",
    "-1",
    "null",
    "%27%20or%201=1",
    "a%2fb",
)

# Bodies that are wrong for every route: name, content type, bytes.
BODIES: tuple[tuple[str, str, bytes], ...] = (
    ("nothing", JSON, b""),
    ("white space", JSON, b" \n\t" * 100),
    ("a number", JSON, b"5"),
    ("null", JSON, b"null"),
    ("a list", JSON, b"[]"),
    ("text", JSON, b'"images"'),
    ("half an object", JSON, b'{"images":'),
    ("two objects", JSON, b"{}{}"),
    ("a comma too many", JSON, b'{"images":[],}'),
    ("not a number", JSON, b'{"images":NaN}'),
    ("infinity", JSON, b'{"images":-Infinity}'),
    ("a huge number", JSON, b'{"images":1e999}'),
    ("many digits", JSON, b'{"images":' + b"9" * 5000 + b"}"),
    ("deep lists", JSON, b"[" * 50_000 + b"]" * 50_000),
    ("deep objects", JSON, b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    ("very many values", JSON, b'{"images":[' + b"{}," * 1_000_000 + b"{}]}"),
    ("not UTF-8", JSON, b'{"images":"\xff\xfe"}'),
    ("UTF-16", JSON, '{"images":[]}'.encode("utf-16")),
    ("a lone surrogate", JSON, b'{"\\ud800":1}'),
    ("nul bytes", JSON, bytes(1000)),
    ("pickle", JSON, b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os."),
    ("XML", "application/xml", b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>"),
    ("a form of nothing", FORM, b"--b--\r\n"),
    ("a form without an end", FORM, b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n'),
    ("a form without names", FORM, b"--b\r\n\r\nx\r\n--b--\r\n"),
    ("a form without a boundary", "multipart/form-data", b"--b--\r\n"),
    (
        "a form of many parts",
        FORM,
        b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n' * 500 + b"--b--\r\n",
    ),
    ("garbage", BYTES, bytes(range(256)) * 4),
    ("garbage as an image", "image/png", bytes(range(256)) * 4),
    ("a body over the limit", BYTES, bytes(5_000_001)),
)
# What compression may hold.
CODED = (
    ("no gzip", {"Content-Encoding": "gzip"}, b"abc"),
    ("unknown coding", {"Content-Encoding": "br"}, b"abc"),
    ("gzip twice", {"Content-Encoding": "gzip, gzip"}, b"abc"),
)

# Options of images that no request may have, by operation; `None` is every operation.
OPTIONS: tuple[tuple[str | None, dict[str, object]], ...] = (
    (None, {"nonsense": 1}),
    (None, {"model": "no such model"}),
    (None, {"model": ""}),
    (None, {"model": "a" * 600}),
    (None, {"model": "a\0b"}),
    (None, {"model": ["a"]}),
    (None, {"timeout_s": -1}),
    (None, {"timeout_s": 0}),
    (None, {"timeout_s": "soon"}),
    (None, {"interventions": "none"}),
    (None, {"interventions": [{}]}),
    (None, {"interventions": [{"layer": "no such", "op": "zero", "channels": [0]}]}),
    (None, {"interventions": [{"layer": "body", "op": "zero", "channels": []}]}),
    (None, {"interventions": [{"layer": "body", "op": "zero", "channels": [-1]}]}),
    (None, {"interventions": [{"layer": "body", "op": "explode", "channels": [0]}]}),
    (None, {"interventions": [{"layer": "body", "op": "zero", "channels": [0]}] * 17}),
    ("predict", {"top_k": 0}),
    ("predict", {"top_k": 101}),
    ("predict", {"top_k": 1.5}),
    ("predict", {"top_k": None}),
    ("predict", {"statistics": "maybe"}),
    ("predict", {"methods": ["gradcam"]}),
    ("explain", {"methods": []}),
    ("explain", {"methods": ["no such method"]}),
    ("explain", {"methods": "gradcam " * 100}),
    ("explain", {"methods": [None]}),
    ("explain", {"targets": []}),
    ("explain", {"targets": [-1]}),
    ("explain", {"targets": [10**30]}),
    ("explain", {"targets": [True]}),
    ("explain", {"targets": [1.5]}),
    ("explain", {"targets": ["top0"]}),
    ("explain", {"targets": ["no such label"]}),
    ("explain", {"targets": [{"against": [1]}]}),
    ("explain", {"targets": [{"class": 1, "against": [1] * 1001}]}),
    ("explain", {"targets": [{"class": {"class": 1}}]}),
    ("explain", {"targets": [1] * 17}),
    ("explain", {"layers": []}),
    ("explain", {"layers": ["../../etc"]}),
    ("explain", {"layers": ["[!" * 200]}),
    ("explain", {"layers": ["a"] * 65}),
    ("explain", {"fuse": "melt"}),
    ("explain", {"outputs": []}),
    ("explain", {"outputs": ["everything"]}),
    ("explain", {"canvas": "wall"}),
    ("explain", {"colormap": "rainbow"}),
    ("explain", {"clip": 0.5}),
    ("explain", {"clip": -1}),
    ("explain", {"alpha": 2}),
    ("explain", {"alpha": "half"}),
    ("explain", {"overlay_format": "tiff"}),
    ("explain", {"faithfulness": ["honesty"]}),
    ("explain", {"samples": 0}),
    ("explain", {"samples": 10_001}),
    ("explain", {"steps": 1_001}),
    ("explain", {"seed": -1}),
    ("explain", {"seed": 2**63}),
    ("features", {"kinds": []}),
    ("features", {"kinds": ["weights"]}),
    ("features", {"channels": 0}),
    ("features", {"channels": 5000}),
    ("features", {"grid": "large"}),
    ("features", {"layers": ["no such layer"]}),
)
QUERIES = (
    "nonsense=1",
    "model=%ff",
    "model=a&model=b",
    "interventions=[]",
    "&".join(f"k{i}=1" for i in range(2000)),
)
IMAGES: tuple[object, ...] = (
    None,
    [],
    {},
    "images",
    [None],
    [[]],
    [{}],
    [{"b64": None}],
    [{"b64": 5}],
    [{"b64": ""}],
    [{"b64": "====", "url": None}],
    [{"b64": "\u00e9\u4e2d"}],
    [{"b64": "data:image/png;base64,"}],
    [{"b64": B64, "url": "https://a/"}],
    [{"b64": B64, "more": 1}],
    [{"b64": B64, "targets": []}],
    [{"b64": B64, "targets": ["no such label"]}],
    [{"url": "https://127.0.0.1/"}],
    [{"url": "file:///etc/passwd"}],
    [{"url": "http://169.254.169.254/latest/meta-data"}],
    [{"url": "gopher://a"}],
    [{"url": "a" * 5000}],
    [{"b64": B64}] * 33,
)


def bad_requests(app: FastAPI) -> Iterator[Bad]:
    """Every bad request, for the routes that an application has."""
    for context in iter_route_contexts(app.routes):
        pattern = re.sub(r":\w+}", "}", str(context.path))
        for method in sorted(context.methods or ()):
            if method in ("POST", "PUT"):
                yield from _bad_bodies(method, re.sub(r"{\w+}", "x", pattern))
            if "{" in pattern:
                for name in NAMES:
                    path = re.sub(r"{\w+}", lambda _, name=name: name, pattern)
                    yield Bad(f"{method} {pattern} of {name[:20]}", method, path)
        yield Bad(f"another method for {pattern}", "BREW", re.sub(r"{\w+}", "x", pattern))
    yield from _bad_options()
    yield from _bad_images()


def _bad_bodies(method: str, path: str) -> Iterator[Bad]:
    for name, content_type, body in BODIES:
        yield Bad(f"{path}: {name}", method, path, body, {"Content-Type": content_type})
    for name, headers, body in CODED:
        yield Bad(f"{path}: {name}", method, path, body, {"Content-Type": JSON, **headers})


def _bad_options() -> Iterator[Bad]:
    headers = {"Content-Type": JSON}
    for operation in ("predict", "explain", "features"):
        path = f"/v1/{operation}"
        for only, options in OPTIONS:
            if only in (None, operation):
                body = json.dumps({"images": [{"b64": B64}], **options}).encode()
                yield Bad(f"{path}: {str(options)[:60]}", "POST", path, body, headers)
        for images in IMAGES:
            body = json.dumps({"images": images}).encode()
            yield Bad(f"{path}: images {str(images)[:50]}", "POST", path, body, headers)
        for query in (
            "nonsense=1",
            "model=%ff",
            "model=a&model=b",
            "interventions=[]",
            "&".join(f"k{i}=1" for i in range(2000)),
        ):
            yield Bad(
                f"{path}?{query[:30]}", "POST", f"{path}?{query}", PNG, {"Content-Type": BYTES}
            )
        timeout = {"Content-Type": BYTES, "X-Request-Timeout-Ms": "soon"}
        yield Bad(f"{path}: a timeout that is no number", "POST", path, PNG, timeout)


def _bad_images() -> Iterator[Bad]:
    for name, data in bad_pictures():
        yield Bad(f"an image: {name}", "POST", "/v1/predict", data, {"Content-Type": BYTES})
