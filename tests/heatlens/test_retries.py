"""When a request is sent again, and how long the client waits before that."""

import json

import httpx
import pytest

from heatlens import APIError, AsyncClient, Client, ConnectionFailed, protocol


def refusal(status: int, code: str, *, retryable: bool, **headers: str) -> httpx.Response:
    body = {"error": "No.", "code": code, "request_id": "1", "retryable": retryable}
    return httpx.Response(status, headers=headers, content=json.dumps(body))


SUCCESS = {
    "request_id": "1",
    "model": {"name": "m", "version": "1", "device": "cpu", "precision": "fp32"},
    "results": [{"predictions": []}],
}


class Server:
    """Answers with one response after the other, and counts."""

    def __init__(self, *responses: httpx.Response | Exception) -> None:
        self.responses = list(responses)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        response = self.responses.pop(0)
        if isinstance(response, Exception):
            raise response
        return response


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("heatlens.client.time.sleep", waited.append)
    return waited


def predict(server: Server, **settings) -> object:
    with Client("http://service", transport=httpx.MockTransport(server), **settings) as client:
        return client.predict(b"image")


def test_an_overloaded_service_is_asked_again_when_it_says(pauses):
    busy = refusal(429, "overloaded", retryable=True, **{"Retry-After": "3"})
    server = Server(busy, httpx.Response(200, json=SUCCESS))
    predict(server)
    assert pauses == [3.0]
    assert len(server.requests) == 2
    assert all(b"image" in request.content for request in server.requests)
    first, again = (request.headers.get("X-Request-ID") for request in server.requests)
    assert (first, again) == (None, "1"), "it tells that it is the one that was refused"


def test_without_advice_the_pauses_grow(pauses):
    lost = [refusal(503, "worker_lost", retryable=True) for _ in range(3)]
    predict(Server(*lost, httpx.Response(200, json=SUCCESS)))
    assert len(pauses) == 3
    assert 0.125 <= pauses[0] <= 0.25
    assert 0.5 <= pauses[2] <= 1.0


def test_the_last_error_is_raised_when_all_attempts_failed(pauses):
    server = Server(*[refusal(429, "overloaded", retryable=True) for _ in range(4)])
    with pytest.raises(APIError) as caught:
        predict(server, attempts=4)
    assert caught.value.code == "overloaded"
    assert len(server.requests) == 4


def test_what_cannot_succeed_is_not_sent_again(pauses):
    server = Server(refusal(404, "unknown_model", retryable=False))
    with pytest.raises(APIError, match="unknown_model"):
        predict(server)
    assert pauses == []


def test_no_wait_beyond_the_timeout(pauses):
    busy = refusal(429, "overloaded", retryable=True, **{"Retry-After": "100"})
    with pytest.raises(APIError):
        predict(Server(busy), timeout_s=5.0)
    assert pauses == []


def test_a_broken_connection_is_tried_again(pauses):
    server = Server(httpx.ConnectError("refused"), httpx.Response(200, json=SUCCESS))
    predict(server)
    assert len(server.requests) == 2


def test_an_unreachable_service_is_a_typed_error(pauses):
    with pytest.raises(ConnectionFailed, match="http://service/"):
        predict(Server(*[httpx.ConnectError("refused") for _ in range(4)]))


def test_the_page_of_a_proxy_is_an_error_too(pauses):
    with pytest.raises(APIError, match="502"):
        predict(Server(*[httpx.Response(502, text="<html>") for _ in range(4)]))
    assert len(pauses) == 3


def test_a_key_is_sent_from_the_environment(monkeypatch):
    monkeypatch.setenv("HEATLENS_API_KEY", "secret")
    server = Server(httpx.Response(200, json=SUCCESS))
    predict(server)
    assert server.requests[0].headers["X-API-Key"] == "secret"


def events(*lines: str) -> httpx.Response:
    return httpx.Response(200, content="\n".join(lines) + "\n")


STREAM = (
    ": waiting",
    "event: progress",
    'data: {"what": "rise", "done": 5, "total": 10, "seconds_left": 1.5}',
    "",
    "event: result",
    f"data: {json.dumps(SUCCESS)}",
    "",
)


def test_progress_is_told_while_the_service_works():
    seen = []
    server = Server(events(*STREAM))
    with Client("http://service", transport=httpx.MockTransport(server)) as client:
        response = client.explain(b"image", on_progress=seen.append)
    assert [(p.what, p.done, p.total, p.seconds_left) for p in seen] == [("rise", 5, 10, 1.5)]
    assert response.model.name == "m"
    assert server.requests[0].headers["Accept"] == "text/event-stream"


@pytest.mark.anyio
async def test_both_clients_read_the_same_stream():
    seen = []
    transport = httpx.MockTransport(Server(events(*STREAM)))
    async with AsyncClient("http://service", transport=transport) as client:
        await client.explain(b"image", on_progress=seen.append)
    assert seen[0].done == 5


def test_an_error_in_a_stream_is_raised():
    error = {"error": "Late.", "code": "deadline_exceeded", "request_id": "1", "retryable": False}
    server = Server(events("event: error", f"data: {json.dumps(error)}", ""))
    with (
        Client("http://service", transport=httpx.MockTransport(server)) as client,
        pytest.raises(APIError, match="deadline_exceeded"),
    ):
        client.explain(b"image", on_progress=lambda _: None)


def test_a_stream_that_breaks_off_is_a_broken_connection(pauses):
    server = Server(*[events(*STREAM[:4]) for _ in range(2)])
    with (
        Client("http://service", transport=httpx.MockTransport(server), attempts=2) as client,
        pytest.raises(ConnectionFailed),
    ):
        client.explain(b"image", on_progress=lambda _: None)
    assert len(pauses) == 1


def test_many_images_keep_their_order_and_their_errors(tmp_path):
    def answer(request: httpx.Request) -> httpx.Response:
        body = request.read()
        if b"damaged" in body:
            return refusal(422, "image_undecodable", retryable=False)
        return httpx.Response(
            200, json={**SUCCESS, "request_id": body.partition(b"img-")[2][:2].decode()}
        )

    images = [b"img-%02d" % i if i != 3 else b"damaged" for i in range(9)]
    with Client("http://service", transport=httpx.MockTransport(answer)) as client:
        done = list(client.explain_many([*images, tmp_path / "absent.jpg"], in_flight=3))
    assert [item.image for item in done[:9]] == images
    assert [item.response.request_id for item in done[:3]] == ["00", "01", "02"]
    assert done[3].error.code == "image_undecodable"
    assert isinstance(done[9].error, FileNotFoundError)


@pytest.mark.anyio
async def test_no_more_requests_are_in_flight_than_asked():
    import asyncio

    running = most = 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return httpx.Response(200, json=SUCCESS)

    transport = httpx.MockTransport(answer)
    async with AsyncClient("http://service", transport=transport) as client:
        done = [item async for item in client.explain_many([b"x"] * 20, in_flight=4)]
    assert len(done) == 20
    assert 1 < most <= 4


def test_an_event_may_have_several_lines_of_data():
    seen = []
    reader = protocol.EventReader(protocol.Call("POST", "/", on_progress=seen.append))
    for line in ("event:progress", 'data:{"what": "a",', 'data: "done": 1, "total": 2}', ""):
        reader.feed(line)
    assert seen[0].total == 2
