"""EngineClient and the engine process behind it."""

import asyncio
import os
import stat
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest

from chipset.backends.options import EngineOptions, SamplingParams
from chipset.core.errors import EngineDied, NotEnoughMemory, RequestFailed
from chipset.core.messages import EngineLaunch, Submit, Token, Tokens
from chipset.server.client import MAX_BACKLOG, EngineClient
from chipset.server.errors import NotReady

from .fakes import FILES

SCRIPT = Path(__file__).with_name("scripted_engine.py")
LAUNCH = EngineLaunch(commands="", events="", files=FILES, backend="cpu", options=EngineOptions())
Progressed = list[tuple[str, int, int, str]]


def command(mode: str) -> list[str]:
    return [sys.executable, str(SCRIPT), mode]


def submit(request_id: int = 1, prompt: int = 1) -> Submit:
    return Submit(
        request_id=request_id,
        prompt=[prompt],
        sampling=SamplingParams(),
        max_new_tokens=2,
        stop_ids=[],
    )


def run(
    mode: str,
    test: Callable[[EngineClient], Coroutine[Any, Any, None]],
    progressed: Progressed | None = None,
    max_backlog: int = MAX_BACKLOG,
) -> None:
    async def main() -> None:
        seen: Progressed = [] if progressed is None else progressed
        starting = EngineClient.start(
            LAUNCH, lambda *one: seen.append(one), command(mode), max_backlog
        )
        async with starting as client:
            await test(client)

    asyncio.run(main())


async def nothing(_: EngineClient) -> None:
    pass


async def drawn(stream: AsyncGenerator[Tokens, None]) -> list[Token]:
    async with aclosing(stream):
        return [token async for step in stream for token in step.tokens]


def test_it_reports_progress_and_streams_what_is_drawn() -> None:
    progressed: Progressed = []

    async def test(client: EngineClient) -> None:
        assert client.ready.device == "script"
        assert await drawn(client.generate(submit())) == [Token(5), Token(5)]

    run("serve", test, progressed)
    assert progressed == [("load", 1, 2, "B"), ("load", 2, 2, "B")]


def test_the_error_of_a_start_comes_over_as_its_own_class() -> None:
    with pytest.raises(NotEnoughMemory, match="too big") as caught:
        run("refuse", nothing)
    assert caught.value.__notes__ == ["Traceback: x"]


def test_an_engine_that_crashes_while_starting_is_reported_with_its_code() -> None:
    with pytest.raises(EngineDied, match="exit code 7"):
        run("crash", nothing)


def test_a_request_reaches_an_engine_that_is_ready_before_it_listens() -> None:
    async def test(client: EngineClient) -> None:
        assert len(await drawn(client.generate(submit(1)))) == 2

    run("late", test)


def test_a_death_ends_every_stream_and_is_told_to_all() -> None:
    async def test(client: EngineClient) -> None:
        waiting = asyncio.create_task(drawn(client.generate(submit(1, prompt=0))))
        with pytest.raises(EngineDied, match="the device is gone"):
            await waiting
        await asyncio.wait_for(client.died.wait(), 5)
        with pytest.raises(EngineDied):
            await drawn(client.generate(submit(2)))

    run("serve", test)


def test_a_killed_engine_is_named_with_its_signal() -> None:
    async def test(client: EngineClient) -> None:
        client.kill()
        await asyncio.wait_for(client.died.wait(), 5)
        assert "SIGKILL" in str(client.death)

    run("serve", test)


def test_an_engine_that_says_nothing_any_more_is_killed() -> None:
    async def test(client: EngineClient) -> None:
        begun = time.monotonic()
        await asyncio.wait_for(client.died.wait(), 15)
        assert 5 <= time.monotonic() - begun <= 10
        assert "no sign of life" in str(client.death)

    run("silent", test)


def test_a_long_step_is_no_silence() -> None:
    async def test(client: EngineClient) -> None:
        await asyncio.sleep(8)
        assert not client.died.is_set()

    run("serve", test)


def test_leaving_a_stream_early_cancels_its_request() -> None:
    async def test(client: EngineClient) -> None:
        async def first() -> None:
            async with aclosing(client.generate(submit(3))) as stream:
                async for _ in stream:
                    return

        await first()
        for _ in range(500):
            await asyncio.sleep(0.01)
            if client.stats is not None:
                break
        assert client.stats is not None
        assert client.stats.cancelled == 1

    run("slow", test)


def test_a_request_whose_reader_is_too_slow_is_ended() -> None:
    async def test(client: EngineClient) -> None:
        async with aclosing(client.generate(submit())) as stream:
            await anext(stream)
            await asyncio.sleep(1)
            with pytest.raises(RequestFailed, match="slowly"):
                async for _ in stream:
                    pass

    run("slow", test, max_backlog=5)


def test_ending_all_streams_gives_each_its_error() -> None:
    async def test(client: EngineClient) -> None:
        tasks = [asyncio.create_task(drawn(client.generate(submit(one)))) for one in (1, 2)]
        await asyncio.sleep(0.2)
        client.abort_all()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, NotReady)

    run("slow", test)


def test_leaving_ends_the_process_even_one_that_is_deaf() -> None:
    async def main() -> None:
        others = psutil.Process().children()  # servers of other tests
        starting = EngineClient.start(LAUNCH, lambda *_: None, command("hang"))
        task = asyncio.create_task(starting.__aenter__())
        await asyncio.sleep(1)
        children = [child for child in psutil.Process().children() if child not in others]
        assert children
        task.cancel()
        begun = time.monotonic()
        await asyncio.gather(task, return_exceptions=True)
        assert time.monotonic() - begun < 4
        assert not any(child.is_running() for child in children)

    asyncio.run(main())


def listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections("inet")
    return {(one.laddr.ip, one.laddr.port) for one in connections if one.status == "LISTEN"}


def test_the_sockets_are_in_a_folder_of_this_user_alone() -> None:
    before = listening()

    async def test(client: EngineClient) -> None:
        sockets = [Path(one.laddr) for one in psutil.Process().net_connections("unix")]
        [folder] = {one.parent for one in sockets if one.name in ("commands", "events")}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid == os.getuid()
        assert listening() == before

    run("serve", test)
