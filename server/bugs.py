"""Bugs: what no table of errors knows is logged here and answered with a constant 500."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import is_openai, render
from .metrics import Metrics

log = logging.getLogger(__name__)


class Bugs:
    """ASGI middleware. The connection survives, unless the answer had begun: then all that is left is to cut it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 500."""
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except (
            Exception
        ) as error:  # any at all: it must neither reach the client nor end the server
            if has_begun or scope["type"] != "http":
                raise
            # quoted: a path may hold line breaks
            log.exception("a bug in answering %r", scope["path"])
            answer = render(error, openai=is_openai(scope["path"]))
            self._metrics.failed(answer.error_type)
            await answer.response()(scope, receive, send)
