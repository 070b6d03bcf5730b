"""Supervisor: an engine after another, so that the server outlives one that ends unasked.

engine ends ──▶ requests that drew a token get the error, the others wait ──▶ back-off ──▶ the next one gets them anew
            ──▶ one time too many: everybody gets the error, and the server ends
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Protocol

import msgspec

from ..backends.errors import ChipsetError
from ..core.errors import EngineDied
from ..core.messages import EngineLaunch, Ready, Stats, Submit, Tokens
from .errors import NotReady

WINDOW_S = 300.0
"""Restarts are counted over this time."""
FIRST_DELAY_S, MAX_DELAY_S = 0.5, 8.0
MAX_ABOARD = 2
"""Engines that end before a request has drawn a token: then it gets the error, for it may be what ends them."""


class Client(Protocol):
    """The part of EngineClient that is supervised."""

    ready: Ready
    died: asyncio.Event
    death: EngineDied

    @property
    def stats(self) -> Stats | None:
        """The last that it told; None: none yet."""

    def generate(self, submit: Submit) -> AsyncGenerator[Tokens, None]:
        """See EngineClient.generate."""

    def abort_all(self) -> None:
        """See EngineClient.abort_all."""


class Watcher(Protocol):
    """Who is told how it goes."""

    def interrupted(self, why: str) -> None:
        """Nothing is served until `resumed`; one line says why, and what happens."""

    def resumed(self) -> None:
        """The next engine serves."""


Start = Callable[[EngineLaunch], AbstractAsyncContextManager[Client]]
"""Starts an engine, gives it once it is ready, and ends it on leaving."""


class Restarts:
    """How often an engine is started anew, and after what pause."""

    def __init__(
        self,
        most: int,
        *,
        first_delay_s: float = FIRST_DELAY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = most
        self._first_delay_s = first_delay_s
        self._clock = clock
        self._moments: deque[float] = deque()

    def next_delay(self) -> float | None:
        """Seconds to wait before the next start, doubled each time; None where there were too many of late."""
        now = self._clock()
        while self._moments and now - self._moments[0] > WINDOW_S:
            self._moments.popleft()
        if len(self._moments) >= self.most:
            return None
        delay: float = min(self._first_delay_s * 2 ** len(self._moments), MAX_DELAY_S)
        self._moments.append(now)
        return delay

    def __str__(self) -> str:
        return f"{len(self._moments)} of {self.most} within {WINDOW_S / 60:.0f} minutes"


class Supervisor:
    """An engine as requests see it, whichever process it is now. Belongs to one event loop. Made by `start`."""

    ready: Ready
    """The first engine's. Those after it have the same limits."""
    failed: asyncio.Event
    """Set once there will be no engine any more; `failure` says why."""
    failure: EngineDied

    def __init__(self, launch: EngineLaunch, start: Start, restarts: Restarts, watcher: Watcher):
        self._launch = launch
        self._start = start
        self._restarts = restarts
        self._watcher = watcher
        self._client: Client | None = None
        self._refusal: ChipsetError | None = None
        self._changed = asyncio.Event()
        """Set while there is an engine, or a refusal."""
        self._is_first = True
        self.failed = asyncio.Event()
        self.failure = EngineDied("the engine process ended")

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls, launch: EngineLaunch, start: Start, restarts: Restarts, watcher: Watcher
    ) -> AsyncIterator[Supervisor]:
        """Wait for the first engine, end the one that there is on leaving. Raises what kept the first from starting."""
        supervisor = cls(launch, start, restarts, watcher)
        running = asyncio.create_task(supervisor._supervise())
        serving = asyncio.create_task(supervisor._changed.wait())
        try:
            await asyncio.wait({running, serving}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            yield supervisor
        finally:
            supervisor._refuse(NotReady("the server is ending"))
            for task in (running, serving):
                task.cancel()
            await asyncio.gather(running, serving, return_exceptions=True)

    @property
    def stats(self) -> Stats | None:
        """Of the engine that there is."""
        return None if self._client is None else self._client.stats

    async def generate(self, submit: Submit) -> AsyncGenerator[Tokens, None]:
        """What EngineClient.generate gives, and raises; waits for the next engine where one ended before it drew.

        Raises EngineDied where it had drawn, and where MAX_ABOARD engines have ended under it.
        """
        for aboard in range(1, MAX_ABOARD + 1):
            client = await self._serving()
            has_drawn = False
            try:
                async with aclosing(client.generate(submit)) as steps:
                    async for tokens in steps:
                        has_drawn = True
                        yield tokens
                return
            except EngineDied:
                self._leave(client)
                if has_drawn or aboard == MAX_ABOARD:
                    raise

    def abort_all(self) -> None:
        """End every request, the waiting ones too, with NotReady."""
        self._refuse(NotReady("the server is ending"))
        if self._client is not None:
            self._client.abort_all()

    async def _supervise(self) -> None:
        """Returns when there was an engine too many; raises what kept the first from starting."""
        launch = self._launch
        while True:
            try:
                async with self._start(launch) as client:
                    launch = self._enter(client)
                    await client.died.wait()
                    self._leave(client)
                    delay = self._interrupt(client.death)
            except (ChipsetError, OSError) as error:
                if self._is_first:
                    raise
                delay = self._interrupt(error)
            if delay is None:
                return
            await asyncio.sleep(delay)

    def _enter(self, client: Client) -> EngineLaunch:
        """Serve by `client`. What is to be told to those after it: the size of the cache is decided once."""
        if self._is_first:
            self.ready = client.ready
            self._is_first = False
        else:
            _check_same(self.ready, client.ready)
            self._watcher.resumed()
        self._client = client
        self._changed.set()
        kv_bytes = self.ready.kv_bytes or self._launch.options.kv_bytes
        options = dataclasses.replace(self._launch.options, kv_bytes=kv_bytes)
        return msgspec.structs.replace(self._launch, options=options)

    def _leave(self, client: Client) -> None:
        if self._client is client:
            self._client = None
            if self._refusal is None:
                self._changed.clear()

    def _interrupt(self, death: Exception) -> float | None:
        """Seconds until the next start, told to the watcher; None where there will be none."""
        delay = self._restarts.next_delay()
        if delay is None:
            self._give_up(death)
        else:
            self._watcher.interrupted(f"{death}; restart {self._restarts} in {delay:g} s")
        return delay

    def _give_up(self, death: Exception) -> None:
        most = self._restarts.most
        told = f"{death}; restarted {most} times within {WINDOW_S / 60:.0f} minutes: see --max-restarts"
        self.failure = EngineDied(told if most else str(death))
        for note in getattr(death, "__notes__", ()):
            self.failure.add_note(note)
        self._refuse(self.failure)
        self.failed.set()

    def _refuse(self, refusal: ChipsetError) -> None:
        self._refusal = self._refusal or refusal
        self._changed.set()

    async def _serving(self) -> Client:
        """The engine that there is, or will be. Raises why there will be none."""
        while True:
            if self._refusal is not None:
                raise self._refusal
            if self._client is not None:
                return self._client
            await self._changed.wait()


def _check_same(first: Ready, now: Ready) -> None:
    """Requests are checked against the limits of the first engine, so those of the others may not differ."""
    for name in ("max_context", "max_logprobs", "max_logit_bias", "features", "kv_tokens"):
        was, got = getattr(first, name), getattr(now, name)
        if was != got:
            raise EngineDied(f"the engine came back with {name} {got}, which was {was}")
