"""BodyLimit: a body is JSON and of bounded size, counted as it is received."""

from __future__ import annotations

import asyncio
from email.message import Message

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from .errors import HttpError, is_openai, render

TIMEOUT_S = 30.0
"""For one body to arrive."""


class BodyLimit:
    """ASGI middleware: reads the whole body before the app sees the request.

    Answers 413 past `limit` bytes, 415 where the content is not said to be JSON, 408 after `timeout_s`.
    """

    def __init__(self, app: ASGIApp, limit: int, timeout_s: float = TIMEOUT_S) -> None:
        self._app = app
        self._limit = limit
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 408, 413 or 415."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(scope, receive)
        except TimeoutError:
            late = HttpError(408, "timeout", "the body did not arrive", {"Connection": "close"})
            await render(late, openai=is_openai(scope["path"])).response()(scope, receive, send)
            return
        except HttpError as error:
            response = render(error, openai=is_openai(scope["path"])).response()
            await response(scope, receive, send)
            return
        if body is None:
            return
        first: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Event:
            return first.pop() if first else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """None where the client left meanwhile. Raises HttpError."""
        kind = Message()
        kind["content-type"] = Headers(scope=scope).get("content-type", "")
        if kind.get_content_type() != "application/json":
            raise HttpError(415, "unsupported_media_type", "send Content-Type: application/json")
        parts: list[bytes] = []
        size = 0
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                return None
            parts.append(event.get("body", b""))
            size += len(parts[-1])
            if size > self._limit:
                # what is still under way need not be read
                raise HttpError(
                    413,
                    "payload_too_large",
                    f"the body is larger than {self._limit} bytes; see --payload-limit",
                    {"Connection": "close"},
                )
            if not event.get("more_body", False):
                return b"".join(parts)
