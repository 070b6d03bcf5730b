"""TrustedHosts: a server on loopback answers only requests addressed to it, so that no web page reaches it by DNS."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import HttpError, is_openai, render

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class TrustedHosts:
    """ASGI middleware: the Host header names one of `hosts`, and a page's Origin is this very server.

    With None both are open: behind a proxy Host is not what the page was loaded from, and a page of another origin
    cannot send JSON without a leave that nobody gives it.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 403."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            response = render(error, openai=is_openai(scope["path"])).response()
            await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> HttpError | None:
        if self._hosts is None:
            return None
        headers = Headers(scope=scope)
        named = headers.getlist("host")
        host = named[0].lower() if len(named) == 1 else ""
        if _without_port(host) not in self._hosts:
            return HttpError(
                403,
                "forbidden",
                "this Host is not served; use the address in the start-up summary, or --host",
            )
        origin = headers.get("origin")
        is_foreign = origin is not None and urlsplit(origin).netloc.lower() != host
        if scope["method"] == "POST" and is_foreign:
            return HttpError(403, "forbidden", "pages of other origins may not post here")
        return None


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
