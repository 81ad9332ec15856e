"""Every message arrives once, whatever else was done with the socket before it was read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import uvloop
import zmq

from service.devices.message_socket import MessageSocket


def frames_of(message: list[zmq.Frame]) -> list[bytes]:
    return [frame.bytes for frame in message]


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_messages_cross_both_ways(
    new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path
) -> None:
    async def talk() -> list[int]:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        router.bind(f"ipc://{tmp_path}/socket")
        dealer.connect(f"ipc://{tmp_path}/socket")
        answered: list[int] = []
        done = asyncio.Event()

        def answer(message: list[zmq.Frame]) -> None:
            identity, number, _ = frames_of(message)
            # To send is to use the socket: what came meanwhile must not be forgotten.
            server.send([identity, number])

        def hear(message: list[zmq.Frame]) -> None:
            (number,) = frames_of(message)
            answered.append(int(number))
            if len(answered) == 300:
                done.set()

        server, client = MessageSocket(router, answer), MessageSocket(dealer, hear)
        for number in range(300):
            client.send([str(number).encode(), bytes(100_000 if number % 7 == 0 else 10)])
            if number % 50 == 0:
                await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await done.wait()
        client.close()
        client.close()
        server.close()
        context.destroy(linger=0)
        return answered

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(talk()) == list(range(300))


def test_nothing_is_handed_over_after_the_end(tmp_path) -> None:
    async def talk() -> list[list[bytes]]:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        pull.bind(f"ipc://{tmp_path}/socket")
        push.connect(f"ipc://{tmp_path}/socket")
        heard: list[list[bytes]] = []
        first = asyncio.Event()

        def hear(message: list[zmq.Frame]) -> None:
            heard.append(frames_of(message))
            receiver.close()
            first.set()

        receiver = MessageSocket(pull, hear)
        sender = MessageSocket(push, lambda _: None)
        for number in (b"1", b"2", b"3"):
            sender.send([number])
        async with asyncio.timeout(30):
            await first.wait()
        await asyncio.sleep(0.05)
        sender.close()
        context.destroy(linger=0)
        return heard

    assert asyncio.run(talk()) == [[b"1"]]
