"""ApiKey: every route wants the key except those named here, so a new route is closed until somebody opens it."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import HttpError, is_openai, render

OPEN_PATHS = frozenset({"/health", "/ready"})


class ApiKey:
    """ASGI middleware: `Authorization: Bearer KEY` or `x-api-key: KEY`, compared in constant time."""

    def __init__(self, app: ASGIApp, key: str, open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self._app = app
        self._digest = _digest(key)
        self._open = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401."""
        # the raw path of the scope: nothing that a header says enters the decision
        if scope["type"] != "http" or scope["path"] in self._open or self._holds_key(scope):
            await self._app(scope, receive, send)
            return
        error = HttpError(
            401,
            "unauthorized",
            "missing or wrong API key; send it as Authorization: Bearer KEY",
            {"WWW-Authenticate": "Bearer"},
        )
        response = render(error, openai=is_openai(scope["path"])).response()
        await response(scope, receive, send)

    def _holds_key(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        given = [
            value[7:].strip()
            for value in headers.getlist("authorization")
            if value[:7].lower() == "bearer "
        ]
        given += headers.getlist("x-api-key")
        # every key that was sent must be right: proxies disagree on which of two headers counts
        wrong = sum(not hmac.compare_digest(_digest(key), self._digest) for key in given)
        return bool(given) and not wrong


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
