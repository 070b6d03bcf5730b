"""EngineClient: the asynchronous face of the engine process. Submit, stream, cancel."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from ..core.errors import EngineDied, InvalidRequest, RequestFailed
from ..core.failures import heard
from ..core.heartbeat import BEAT_S, HUNG_BEATS, Silence
from ..core.messages import (
    Cancel,
    Command,
    EngineLaunch,
    Event,
    Fatal,
    Progress,
    Ready,
    Rejected,
    StartFailed,
    Stats,
    StepDone,
    Stop,
    Submit,
    Tokens,
    decode_event,
    encode,
)
from .engine_process import COMMAND, EngineProcess
from .errors import NotReady

MAX_BACKLOG = 4096
"""Steps of one request that wait for a slow reader; past it the request is ended."""
LAST_WORDS_S = 0.2
"""For what an engine that just ended had still sent."""
LISTENING_POLL_S = 0.005


class _Stream:
    """What the engine sent for one request and its reader has not taken yet."""

    def __init__(self) -> None:
        self.backlog: deque[Tokens] = deque()
        self.error: BaseException | None = None
        self.arrived = asyncio.Event()

    def put(self, tokens: Tokens) -> None:
        self.backlog.append(tokens)
        self.arrived.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.arrived.set()


class EngineClient:
    """Belongs to one event loop. Made by `start`; every stream it gave out ends when it ends."""

    ready: Ready
    stats: Stats | None
    died: asyncio.Event
    """Set when the engine ended without being asked to; `death` says how."""
    death: EngineDied

    def __init__(
        self,
        process: EngineProcess,
        commands: zmq.Socket[bytes],
        events: zmq.asyncio.Socket,
        max_backlog: int,
    ) -> None:
        self._process = process
        self._commands = commands
        self._events = events
        self._max_backlog = max_backlog
        self._streams: dict[int, _Stream] = {}
        self._last_words: Fatal | None = None
        self._silence = Silence()
        self._is_serving = False
        self.stats = None
        self.died = asyncio.Event()
        self.death = EngineDied("the engine process ended")

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls,
        launch: EngineLaunch,
        progress: Callable[[str, int, int, str], None],
        command: Sequence[str] = COMMAND,
        max_backlog: int = MAX_BACKLOG,
    ) -> AsyncIterator[EngineClient]:
        """Start the engine process, wait until it is ready, end it on leaving; `launch` gets its addresses here.

        `progress` gets (phase, done, total, unit). Raises the error that the engine failed with, or EngineDied.
        """
        with (
            # mode 0700: only this user reaches the sockets
            tempfile.TemporaryDirectory(prefix="chipset-", ignore_cleanup_errors=True) as folder,
            zmq.Context() as context,
        ):
            commands = zmq.Socket(context, zmq.PUSH)
            events = zmq.asyncio.Socket(context, zmq.PULL)
            try:
                addressed = msgspec.structs.replace(
                    launch,
                    commands=_bind(commands, f"ipc://{folder}/commands"),
                    events=_bind(events, f"ipc://{folder}/events"),
                )
                process = await EngineProcess.start(addressed, command)
                client = cls(process, commands, events, max_backlog)
                try:
                    async with client._running(progress):
                        yield client
                finally:
                    client._send_quietly(Stop())
                    await process.stop(was_told=client._is_serving)
            finally:
                commands.close()
                events.close()

    @contextlib.asynccontextmanager
    async def _running(self, progress: Callable[[str, int, int, str], None]) -> AsyncIterator[None]:
        exit_text = asyncio.create_task(self._process.wait())
        tasks: list[asyncio.Task[Any]] = [exit_text]
        try:
            self.ready = await self._wait_ready(exit_text, progress)
            await self._wait_listening(exit_text)
            self._is_serving = True
            tasks.append(asyncio.create_task(self._read()))
            tasks.append(asyncio.create_task(self._watch(exit_text)))
            tasks.append(asyncio.create_task(self._listen()))
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._fail_all(NotReady("the server is ending"))

    async def _wait_ready(
        self, exit_text: asyncio.Task[str], progress: Callable[[str, int, int, str], None]
    ) -> Ready:
        while True:
            match await self._next_event(exit_text):
                case Progress(phase, done, total, unit):
                    progress(phase, done, total, unit)
                case Stats() as stats:
                    self.stats = stats
                case Ready() as ready:
                    return ready
                case StartFailed() as failed:
                    raise heard(failed)
                case Fatal(message=message, traceback=traceback):
                    died = EngineDied(f"the engine ended while it started: {message}")
                    died.add_note(traceback)
                    raise died
                case None:
                    raise EngineDied(
                        f"the engine process ended while it started ({exit_text.result()}); "
                        "run with --debug for more"
                    )
                case _:
                    pass

    async def _wait_listening(self, exit_text: asyncio.Task[str]) -> None:
        """Its two sockets connect one by one, so it may say that it is ready before it can be told anything."""
        while not self._commands.poll(0, zmq.POLLOUT):
            if exit_text.done():
                raise EngineDied(f"the engine process ended as it began: {exit_text.result()}")
            await asyncio.sleep(LISTENING_POLL_S)

    async def _next_event(self, exit_text: asyncio.Task[str]) -> Event | None:
        """None once the process has ended and all it sent was read."""
        receiving = asyncio.ensure_future(self._events.recv())
        await asyncio.wait({receiving, exit_text}, return_when=asyncio.FIRST_COMPLETED)
        if not receiving.done():
            # last words may still be under way
            await asyncio.wait({receiving}, timeout=LAST_WORDS_S)
        if not receiving.done():
            receiving.cancel()
            return None
        event: Event = decode_event(receiving.result())
        return event

    async def _read(self) -> None:
        """Hand out what the engine sends."""
        while True:
            try:
                event = decode_event(await self._events.recv())
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                self._die(f"it sent what is no event: {error}")
                return
            self._silence.heard()
            match event:
                case StepDone(outputs):
                    for tokens in outputs:
                        self._deliver(tokens)
                case Rejected(request_id=request_id, message=message):
                    self._fail(request_id, InvalidRequest(message))
                case Stats() as stats:
                    self.stats = stats
                case Fatal() as fatal:
                    self._last_words = fatal
                case _:
                    pass

    async def _watch(self, exit_text: asyncio.Task[str]) -> None:
        """Wait for the end of the process, then for what it still sent, and tell everyone."""
        how = await exit_text
        await asyncio.sleep(LAST_WORDS_S)
        self._die(self._last_words.message if self._last_words else how)

    async def _listen(self) -> None:
        """Kill an engine that gives no sign of life."""
        while True:
            await asyncio.sleep(BEAT_S)
            if self._silence.is_over_long():
                how = f"it gave no sign of life for {HUNG_BEATS * BEAT_S:.0f} s"
                self._last_words = Fatal(message=how, traceback="")
                self.kill()
                return

    def _deliver(self, tokens: Tokens) -> None:
        stream = self._streams.get(tokens.request_id)
        if stream is None:
            return
        if len(stream.backlog) >= self._max_backlog:
            self._fail(
                tokens.request_id, RequestFailed("the client reads more slowly than text comes")
            )
            self._send_quietly(Cancel([tokens.request_id]))
            return
        stream.put(tokens)

    def _fail(self, request_id: int, error: BaseException) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.fail(error)

    def _fail_all(self, error: BaseException) -> None:
        for request_id in list(self._streams):
            self._fail(request_id, error)

    def _die(self, how: str) -> None:
        self.death = EngineDied(f"the engine process ended: {how}")
        if self._last_words is not None and self._last_words.traceback:
            self.death.add_note(self._last_words.traceback)
        self._fail_all(self.death)
        self.died.set()

    def abort_all(self) -> None:
        """End every open stream with NotReady and tell the engine to drop them."""
        ids = list(self._streams)
        self._fail_all(NotReady("the server is ending"))
        if ids:
            self._send_quietly(Cancel(ids))

    def kill(self) -> None:
        """End the engine process at once."""
        self._process.kill()

    def _send(self, command: Command) -> None:
        # the queue has no limit, so this fails only where nobody listens any more
        try:
            self._commands.send(encode(command), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise EngineDied("the engine process ended") from error

    def _send_quietly(self, command: Command) -> None:
        with contextlib.suppress(EngineDied):
            self._send(command)

    async def generate(self, submit: Submit) -> AsyncGenerator[Tokens, None]:
        """What the engine draws for `submit`, one item a step, until a finish reason.

        Leaving early, by cancellation too, cancels the request: wrap it in contextlib.aclosing.
        Raises InvalidRequest, RequestFailed, EngineDied, NotReady.
        """
        if self.died.is_set():
            raise self.death
        stream = self._streams[submit.request_id] = _Stream()
        finished = False
        try:
            self._send(submit)
            while not finished:
                while not stream.backlog:
                    if stream.error is not None:
                        raise stream.error
                    stream.arrived.clear()
                    await stream.arrived.wait()
                tokens = stream.backlog.popleft()
                finished = tokens.finish_reason is not None
                if tokens.finish_reason == "error":
                    raise RequestFailed(tokens.error or "a step failed")
                yield tokens
        finally:
            if self._streams.pop(submit.request_id, None) is not None and not finished:
                self._send_quietly(Cancel([submit.request_id]))


def _bind(socket: zmq.Socket[bytes] | zmq.asyncio.Socket, address: str) -> str:
    socket.set_hwm(0)
    socket.linger = 0
    socket.bind(address)
    return address
