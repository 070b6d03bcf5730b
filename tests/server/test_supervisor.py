"""Supervisor over clients that die on command."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chipset.backends.options import EngineOptions
from chipset.core.errors import EngineDied, NotEnoughMemory
from chipset.core.messages import EngineLaunch, Ready, Stats, Submit, Token, Tokens
from chipset.server.errors import NotReady
from chipset.server.supervisor import MAX_DELAY_S, WINDOW_S, Restarts, Supervisor

from .fakes import FILES, ready, stats
from .test_client import submit

LAUNCH = EngineLaunch(commands="", events="", files=FILES, backend="cpu", options=EngineOptions())


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(5000):
        if holds():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came")


class FakeClient:
    """Draws as many tokens as it is told to, then waits for its death."""

    def __init__(self, told: Ready, num_tokens: int) -> None:
        self.ready = told
        self.num_tokens = num_tokens
        self.died = asyncio.Event()
        self.death = EngineDied("the engine process ended: it was told to")
        self.aboard: list[int] = []
        self.stats: Stats | None = stats()
        self.is_aborted = False

    def die(self) -> None:
        self.died.set()

    def abort_all(self) -> None:
        self.is_aborted = True

    async def generate(self, one: Submit) -> AsyncGenerator[Tokens, None]:
        self.aboard.append(one.request_id)
        for _ in range(self.num_tokens):
            yield Tokens(one.request_id, [Token(5)])
        if self.num_tokens == 2:
            return
        await self.died.wait()
        raise self.death


class Engines:
    """The clients that there were, and the errors that some starts raise."""

    def __init__(self, *plans: int | Exception, told: list[Ready] | None = None) -> None:
        self.plans = list(plans)
        self.told = told or []
        self.clients: list[FakeClient] = []
        self.launches: list[EngineLaunch] = []
        self.ended: list[FakeClient] = []
        self.events: list[str] = []

    @contextlib.asynccontextmanager
    async def start(self, launch: EngineLaunch) -> AsyncIterator[FakeClient]:
        self.launches.append(launch)
        plan = self.plans.pop(0)
        if isinstance(plan, Exception):
            raise plan
        told = self.told.pop(0) if self.told else ready(kv_bytes=4096)
        client = FakeClient(told, plan)
        self.clients.append(client)
        try:
            yield client
        finally:
            self.ended.append(client)

    def interrupted(self, why: str) -> None:
        self.events.append(why)

    def resumed(self) -> None:
        self.events.append("resumed")

    async def at_least(self, count: int) -> FakeClient:
        await until(lambda: len(self.clients) >= count)
        return self.clients[count - 1]


def supervised(
    engines: Engines, test: Callable[[Supervisor], Awaitable[None]], most: int = 5
) -> None:
    async def main() -> None:
        starting = Supervisor.start(
            LAUNCH, engines.start, Restarts(most, first_delay_s=0.001), engines
        )
        async with starting as supervisor:
            await asyncio.wait_for(test(supervisor), 10)

    asyncio.run(main())
    assert engines.ended == engines.clients, "an engine was left behind"


async def drawn(supervisor: Supervisor, request_id: int = 1) -> int:
    async with aclosing(supervisor.generate(submit(request_id))) as stream:
        return len([tokens async for tokens in stream])


async def begun(engines: Engines, number: int) -> None:
    await until(lambda: bool(engines.clients[number].aboard))


def test_what_had_drawn_nothing_is_run_by_the_next_engine() -> None:
    engines = Engines(0, 2)

    async def test(supervisor: Supervisor) -> None:
        waiting = asyncio.create_task(drawn(supervisor))
        await begun(engines, 0)
        engines.clients[0].die()
        assert await waiting == 2
        assert engines.clients[1].aboard == [1]

    supervised(engines, test)
    assert "it was told to; restart 1 of 5 within 5 minutes in 0.001 s" in engines.events[0]
    assert engines.events[1:] == ["resumed"]


def test_what_had_drawn_a_token_gets_the_error() -> None:
    engines = Engines(1, 2)

    async def test(supervisor: Supervisor) -> None:
        running = asyncio.create_task(drawn(supervisor))
        await begun(engines, 0)
        engines.clients[0].die()
        with pytest.raises(EngineDied, match="told to"):
            await running
        assert await drawn(supervisor, 2) == 2
        assert engines.clients[1].aboard == [2]

    supervised(engines, test)


def test_two_engines_that_end_under_a_request_are_enough() -> None:
    engines = Engines(0, 0, 2)

    async def test(supervisor: Supervisor) -> None:
        running = asyncio.create_task(drawn(supervisor))
        for number in range(2):
            await engines.at_least(number + 1)
            await begun(engines, number)
            engines.clients[number].die()
        with pytest.raises(EngineDied):
            await running

    supervised(engines, test)


def test_the_first_start_fails_as_it_is() -> None:
    async def test(_: Supervisor) -> None:
        pytest.fail("nothing runs")

    with pytest.raises(NotEnoughMemory, match="too big"):
        supervised(Engines(NotEnoughMemory("too big")), test)


def test_a_later_start_that_fails_is_tried_again() -> None:
    engines = Engines(0, NotEnoughMemory("still in use"), OSError("no process"), 2)

    async def test(supervisor: Supervisor) -> None:
        waiting = asyncio.create_task(drawn(supervisor))
        await begun(engines, 0)
        engines.clients[0].die()
        assert await waiting == 2

    supervised(engines, test)
    assert ["still in use" in one for one in engines.events] == [False, True, False, False]


def test_an_engine_too_many_is_told_to_all() -> None:
    engines = Engines(0, NotEnoughMemory("still in use"))

    async def test(supervisor: Supervisor) -> None:
        waiting = asyncio.create_task(drawn(supervisor))
        await begun(engines, 0)
        engines.clients[0].die()
        await supervisor.failed.wait()
        assert "still in use; restarted 1 times within 5 minutes" in str(supervisor.failure)
        with pytest.raises(EngineDied, match="still in use"):
            await waiting
        with pytest.raises(EngineDied, match="still in use"):
            await drawn(supervisor, 2)

    supervised(engines, test, most=1)


def test_the_size_of_the_cache_is_told_to_those_that_follow() -> None:
    engines = Engines(0, 0)

    async def test(_: Supervisor) -> None:
        engines.clients[0].die()
        await engines.at_least(2)

    supervised(engines, test)
    assert [launch.options.kv_bytes for launch in engines.launches] == [None, 4096]


def test_an_engine_with_other_limits_is_not_served() -> None:
    engines = Engines(0, 0, 2, told=[ready(), ready(max_context=100), ready()])

    async def test(supervisor: Supervisor) -> None:
        engines.clients[0].die()
        await engines.at_least(3)
        assert await drawn(supervisor) == 2

    supervised(engines, test)
    assert "came back with max_context 100, which was 512" in engines.events[1]


def test_those_who_wait_are_told_that_the_server_ends() -> None:
    engines = Engines(0, 0)

    async def test(supervisor: Supervisor) -> None:
        engines.clients[0].die()
        await asyncio.sleep(0)
        waiting = asyncio.create_task(drawn(supervisor))
        await asyncio.sleep(0)
        supervisor.abort_all()
        with pytest.raises(NotReady, match="ending"):
            await waiting
        assert supervisor.stats is None

    supervised(engines, test)


def test_ending_tells_the_engine_that_there_is() -> None:
    engines = Engines(0)

    async def test(supervisor: Supervisor) -> None:
        assert supervisor.stats is not None
        supervisor.abort_all()
        assert engines.clients[0].is_aborted

    supervised(engines, test)


@given(st.lists(st.floats(0, 100), max_size=60), st.integers(0, 5))
def test_restarts_stay_within_their_window_and_their_pauses_within_bounds(
    pauses: list[float], most: int
) -> None:
    now = 0.0
    restarts = Restarts(most, clock=lambda: now)
    granted: list[float] = []
    for pause in pauses:
        now += pause
        delay = restarts.next_delay()
        of_late = [moment for moment in granted if now - moment <= WINDOW_S]
        assert (delay is None) == (len(of_late) >= most)
        if delay is not None:
            assert 0 < delay <= MAX_DELAY_S
            granted.append(now)
