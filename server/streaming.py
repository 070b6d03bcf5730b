"""Server-sent events as bytes, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import AbstractContextManager, aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..backends.errors import ChipsetError
from .errors import render
from .metrics import Metrics

T = TypeVar("T")

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_NO_TICKET: AbstractContextManager[object] = contextlib.nullcontext()

_encode = msgspec.json.Encoder().encode


class ClientGone(Exception):
    """Nobody reads the answer any more."""


def frame(value: Any) -> bytes:
    """One event. JSON has no raw line breaks, so one data line always holds it."""
    return b"data: " + _encode(value) + b"\n\n"


def raw_frame(body: bytes) -> bytes:
    """One event of JSON that is already encoded."""
    return b"data: " + body + b"\n\n"


def json_response(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    """A struct, or plain data, as a JSON answer."""
    return Response(_encode(value), headers=dict(headers or {}), media_type="application/json")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientGone, and what `work` raises."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def guarded(
    frames: AsyncGenerator[bytes, None], metrics: Metrics, *, openai: bool
) -> AsyncGenerator[bytes, None]:
    """`frames`, and an event for the error that ends them; OpenAI's streams then say [DONE]."""
    async with aclosing(frames):
        try:
            async for one in frames:
                yield one
        except (
            Exception
        ) as error:  # the status is sent: an event is all that is left to tell the client
            answer = render(error, openai=openai)
            if answer.status == 500 and not isinstance(error, ChipsetError):
                log.exception("a stream failed")
            metrics.failed(answer.error_type)
            yield raw_frame(answer.body)
    if openai:
        yield DONE


class EventStream(Response):
    """Sends frames as they come, a comment where none came for a while, and stops with its client.

    `ticket` is given back whatever happens. `frames` must not raise (see guarded).
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        ticket: AbstractContextManager[object] = _NO_TICKET,
        headers: Mapping[str, str] | None = None,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self._frames = frames
        self._ticket = ticket
        self._keep_alive_s = keep_alive_s
        self._last_sent = time.monotonic()
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers(
            {"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})}
        )
        # the length is not known before the end
        del self.headers["content-length"]

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, unless the client leaves before."""
        with self._ticket:
            await self._run(receive, send)

    async def _run(self, receive: Receive, send: Send) -> None:
        async with aclosing(self._frames):
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            with contextlib.suppress(ClientGone):
                await unless_gone(receive, self._send_all(send))
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        pinging = asyncio.create_task(self._keep_alive(send))
        try:
            async for body in self._frames:
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            pinging.cancel()
            await asyncio.gather(pinging, return_exceptions=True)

    async def _keep_alive(self, send: Send) -> None:
        while True:
            idle = time.monotonic() - self._last_sent
            if idle >= self._keep_alive_s:
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            else:
                await asyncio.sleep(self._keep_alive_s - idle)
