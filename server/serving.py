"""The life of a server: listen, find the model, start the engine, serve, end.

signal 1 ──▶ no new requests ──▶ running ones get --shutdown-timeout ──▶ the rest get a typed error ──▶ engine ends
signal 2 ──▶ everything ends at once
engine ends unasked ──▶ another one, see supervisor.py
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import uvicorn

from ..core.loading.resolve import find_model
from ..core.text.tokenizer import Tokenizer
from .app import create_app
from .background import in_background, leave
from .client import EngineClient
from .console import Console
from .engine_process import COMMAND
from .hosts import is_loopback
from .launch import engine_launch
from .listener import listen, url
from .service import Service
from .settings import ServerSettings
from .supervisor import Restarts, Supervisor

T = TypeVar("T")

MAX_HEADER_BYTES = 65536
KEEP_ALIVE_S = 30
HTTP_END_S = 1
"""For answers that were given their end to leave the building."""


class Stopped(Exception):
    """A signal came while the server started."""


class HttpServer(uvicorn.Server):
    """Leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None."""
        yield


async def serve(
    settings: ServerSettings, console: Console, command: Sequence[str] = COMMAND
) -> None:
    """Serve until a signal comes; `command` starts the engine. Raises what kept it from starting, or EngineDied."""
    listener = listen(settings.host, settings.port)
    if not is_loopback(settings.host) and settings.api_key is None:
        console.note(f"warning: anyone who reaches {settings.host} may use this; see --api-key")
    logging.basicConfig(level=settings.log_level.upper())
    service = Service(settings)
    http = http_server(service)
    stop = asyncio.Event()
    with listener:
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        try:
            async with contextlib.AsyncExitStack() as stack:
                _on_signals(stop)
                engine = await _start(settings, console, service, stop, stack, command)
                files = service.model().files
                console.summary(
                    settings,
                    files,
                    engine.ready,
                    service.model().limits,
                    url(listener, settings.host),
                )
                await _first(stop.wait(), engine.failed.wait(), asyncio.shield(serving))
                if engine.failed.is_set():
                    service.end(dead=True)
                    raise engine.failure
                await _drain(service, engine, settings.shutdown_timeout)
                http.should_exit = True
        except Stopped:
            service.end()
        finally:
            http.should_exit = True
            await serving


def http_server(service: Service) -> HttpServer:
    """What answers HTTP for `service`, over sockets that it is given."""
    level = service.settings.log_level
    config = uvicorn.Config(
        create_app(service),
        http="h11",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        lifespan="off",
        log_config=None,
        log_level=level,
        access_log=level in ("debug", "info"),
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=HTTP_END_S,
    )
    return HttpServer(config)


class _Watcher:
    """Tells the routes and the operator when there is no engine."""

    def __init__(self, service: Service, console: Console) -> None:
        self._service = service
        self._console = console

    def interrupted(self, why: str) -> None:
        """See supervisor.Watcher."""
        self._service.interrupted()
        self._console.note(f"chipset: {why}")

    def resumed(self) -> None:
        """See supervisor.Watcher."""
        self._service.resumed()
        self._console.end_progress()
        self._console.note("chipset: serving again")


async def _start(
    settings: ServerSettings,
    console: Console,
    service: Service,
    stop: asyncio.Event,
    stack: contextlib.AsyncExitStack,
    command: Sequence[str],
) -> Supervisor:
    """From a name to a service that is open. Raises Stopped, and whatever is wrong with the model."""
    finding = partial(
        find_model, settings.model, revision=settings.revision, progress=console.progress
    )
    files = await _unless(stop, in_background(finding))
    tokenizer = await _unless(stop, in_background(partial(Tokenizer.load, files)))
    starting = Supervisor.start(
        engine_launch(settings, files),
        partial(EngineClient.start, progress=console.progress, command=command),
        Restarts(settings.max_restarts),
        _Watcher(service, console),
    )
    engine = await _unless(stop, stack.enter_async_context(starting))
    service.open(files, engine, tokenizer, created=int(time.time()))
    return engine


async def _drain(service: Service, engine: Supervisor, timeout_s: float) -> None:
    """Let what runs come to its end for a while, then end it with an error."""
    service.end()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await service.admission.idle()
    engine.abort_all()


def _on_signals(stop: asyncio.Event) -> None:
    """The first signal sets `stop`; a second one ends this process and the engine at once."""

    def on_signal() -> None:
        if stop.is_set():
            leave(0)
        stop.set()

    loop = asyncio.get_running_loop()
    for one in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(one, on_signal)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when `stop` is set first. Raises Stopped."""
    working = asyncio.ensure_future(work)
    await _first(working, stop.wait())
    if not working.done():
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        raise Stopped
    return working.result()


async def _first(*waits: Any) -> None:
    """Until one of them is done; coroutines among the rest are cancelled."""
    futures = [asyncio.ensure_future(one) for one in waits]
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future, one in zip(futures, waits, strict=True):
            if future is not one:
                future.cancel()
