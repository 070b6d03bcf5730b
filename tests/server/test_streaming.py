"""Server-sent events, keep-alive and tickets, without a network."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from chipset.server.limits import Admission
from chipset.server.streaming import KEEP_ALIVE, ClientGone, EventStream, frame, unless_gone

SCOPE = {"type": "http"}
Sent = list[dict[str, object]]


async def never() -> dict[str, object]:
    await asyncio.Event().wait()
    raise AssertionError


async def gone() -> dict[str, object]:
    return {"type": "http.disconnect"}


def sender(sent: Sent) -> object:
    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    return send


def test_a_frame_is_one_line_of_data() -> None:
    assert frame({"text": "a\nb\r"}) == b'data: {"text":"a\\nb\\r"}\n\n'


def test_a_comment_keeps_a_silent_stream_alive() -> None:
    async def frames() -> AsyncGenerator[bytes, None]:
        yield b"one"
        await asyncio.sleep(0.25)
        yield b"two"

    sent: Sent = []
    asyncio.run(EventStream(frames(), keep_alive_s=0.1)(SCOPE, never, sender(sent)))
    bodies = [message["body"] for message in sent[1:]]
    assert bodies == [b"one", KEEP_ALIVE, KEEP_ALIVE, b"two", b""]
    assert sent[-1]["more_body"] is False
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in headers


def test_leaving_closes_the_frames_and_gives_the_ticket_back() -> None:
    closed = []

    async def frames() -> AsyncGenerator[bytes, None]:
        try:
            await asyncio.sleep(60)
            yield b""
        finally:
            closed.append(True)

    async def main() -> None:
        admission = Admission(1)
        with admission.admit() as ticket:
            stream = EventStream(frames(), ticket.keep())
        assert admission.in_flight == 1

        async def soon() -> dict[str, object]:
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        await stream(SCOPE, soon, sender([]))
        assert admission.in_flight == 0

    asyncio.run(main())
    assert closed == [True]


def test_a_ticket_is_given_back_even_when_the_stream_never_begins() -> None:
    async def frames() -> AsyncGenerator[bytes, None]:
        yield b""

    async def broken(_: object) -> None:
        raise OSError

    async def main() -> None:
        admission = Admission(1)
        with admission.admit() as ticket:
            stream = EventStream(frames(), ticket.keep())
        with pytest.raises(OSError):
            await stream(SCOPE, never, broken)
        assert admission.in_flight == 0

    asyncio.run(main())


def test_work_ends_when_its_client_leaves() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def soon() -> dict[str, object]:
        await asyncio.sleep(0.01)
        return await gone()

    with pytest.raises(ClientGone):
        asyncio.run(unless_gone(soon, work()))
    assert ended == [True]


def test_idle_comes_once_every_place_is_given_back() -> None:
    async def main() -> None:
        admission = Admission(3)
        first, second = admission.admit(), admission.admit(2)
        waiting = asyncio.create_task(admission.idle())
        first.release()
        first.release()
        await asyncio.sleep(0)
        assert not waiting.done()
        assert admission.in_flight == 2
        second.release()
        await asyncio.wait_for(waiting, 1)

    asyncio.run(main())
