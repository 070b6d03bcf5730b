"""Workers and engines that are killed and stopped under load: what clients see, how long it takes, what is left.

python scripts/lib/kill_soak.py [--times N] [--stops N] [--clients N] [--num-shard N]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from served import Served, served

PROMPTS = [f"Here is a short story about {what}:" for what in ("a fox", "the sea", "rain", "Rome")]
NEW_TOKENS = (8, 48)
"""Least and most, so that some requests are in their prompt and some in mid-answer whenever something is lost."""
PAUSE_S = 1.5
"""Something is lost at a random moment before it, with some answers behind it."""
LIMIT_S = 10.0
"""Within which a loss is noticed."""
RESTART_LIMIT_S = 120.0
FLAGS = ("--dtype", "float32", "--max-total-tokens", "256", "--kv-cache-memory", "64MiB")


@dataclass
class Seen:
    """What clients got."""

    whole: int = 0
    equal: int = 0
    """Of these, the same text as before any kill."""
    errors: Counter[str] = field(default_factory=Counter)
    """Typed ones, by status and code."""
    wrong: Counter[str] = field(default_factory=Counter)
    """Anything else: a broken connection, a cut stream, an error without a type."""


class Clients:
    """As many streams at once as there are clients, until told to stop."""

    def __init__(self, url: str, count: int, texts: dict[str, str]) -> None:
        self.seen = Seen()
        self._texts = texts
        self._url = url
        self._stopping = False
        self._changed = asyncio.Condition()
        self._tasks = [asyncio.create_task(self._run(n)) for n in range(count)]

    async def answered(self, count: int) -> None:
        """Wait for so many more whole answers."""
        wanted = self.seen.whole + count
        async with asyncio.timeout(RESTART_LIMIT_S):
            async with self._changed:
                await self._changed.wait_for(lambda: self.seen.whole >= wanted)

    async def stop(self) -> None:
        """Wait for the last answers."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _run(self, number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=self._url, timeout=RESTART_LIMIT_S) as client:
            while not self._stopping:
                prompt = draw.choice(PROMPTS)
                try:
                    text, error = await ask(client, prompt, draw.randint(*NEW_TOKENS))
                except httpx.HTTPError as broken:
                    self.seen.wrong[type(broken).__name__] += 1
                    continue
                if error is None:
                    self.seen.whole += 1
                    self.seen.equal += self._texts[prompt].startswith(text)
                    async with self._changed:
                        self._changed.notify_all()
                elif error.startswith("503"):
                    self.seen.errors[error] += 1
                    await asyncio.sleep(0.2)
                else:
                    self.seen.wrong[error] += 1


async def ask(
    client: httpx.AsyncClient, prompt: str, num_tokens: int = NEW_TOKENS[1]
) -> tuple[str, str | None]:
    """(text, error) of one streamed completion; an error is told as its status and its code or type."""
    body = {
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    text, is_done = "", False
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return "", named(response.status_code, json.loads(await response.aread()))
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    return text, named(503, event)
                text += event["choices"][0]["text"]
    return text, None if is_done else "a stream without its end"


def named(status: int, body: dict) -> str:
    error = body["error"]
    return f"{status} {error.get('code') or error['type']}"


def family(server: Served) -> tuple[psutil.Process, list[psutil.Process]]:
    """The engine and its workers."""
    [engine] = psutil.Process(server.process.pid).children()
    return engine, engine.children()


def left_behind(folder: str) -> dict[str, set[str]]:
    """Files that processes of this program may leave; `folder` is where they put what is temporary."""
    return {
        "shared memory": {one.name for one in Path("/dev/shm").iterdir()},
        "sockets": {one.name for one in Path(folder).glob("chipset-*")},
    }


async def status(client: httpx.AsyncClient, path: str) -> int:
    with contextlib.suppress(httpx.TransportError):
        return (await client.get(path)).status_code
    return 0


async def until(client: httpx.AsyncClient, wanted: int, limit_s: float) -> float:
    """Seconds until /ready answers so."""
    begun = time.monotonic()
    while (seen := await status(client, "/ready")) != wanted:
        if time.monotonic() - begun > limit_s:
            raise TimeoutError(f"/ready is {seen}, not {wanted}, after {limit_s:.0f} s")
        await asyncio.sleep(0.02)
    return time.monotonic() - begun


@dataclass
class Figures:
    """Seconds, by what was done to whom."""

    noticed: dict[str, list[float]] = field(default_factory=dict)
    ready_again: dict[str, list[float]] = field(default_factory=dict)


async def hurt(server: Served, clients: Clients, plan: list[tuple[str, signal.Signals]]) -> Figures:
    """One after the other, each under load."""
    figures, draw = Figures(), random.Random(0)
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        for number, (whom, how) in enumerate(plan, 1):
            await clients.answered(2)
            await asyncio.sleep(draw.uniform(0, PAUSE_S))
            engine, workers = family(server)
            victim = engine if whom == "engine" else workers[number % len(workers)]
            victim.send_signal(how)
            what = f"{how.name} of {whom}"
            noticed = await until(client, 503, LIMIT_S)
            again = await until(client, 200, RESTART_LIMIT_S)
            figures.noticed.setdefault(what, []).append(noticed)
            figures.ready_again.setdefault(what, []).append(again)
            gone = [engine, *workers]
            _, alive = psutil.wait_procs(gone, timeout=2)
            assert not alive, f"after {what} these still run: {alive}"
            print(f"{number:3} {what}: noticed {noticed:.2f} s, ready {again:.1f} s", flush=True)
    return figures


async def soak(server: Served, options: argparse.Namespace) -> tuple[Figures, Seen, bool]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        texts = {prompt: (await ask(client, prompt))[0] for prompt in PROMPTS}
        clients = Clients(server.url, options.clients, texts)
        plan = [
            (whom, signal.SIGKILL) for _ in range(options.times) for whom in ("worker", "engine")
        ]
        plan += [(("worker", "engine")[n % 2], signal.SIGSTOP) for n in range(options.stops)]
        figures = await hurt(server, clients, plan)
        await clients.stop()
        is_right = (await ask(client, PROMPTS[0]))[0] == texts[PROMPTS[0]]
    return figures, clients.seen, is_right


def listeners(server: Served) -> list[str]:
    """Addresses that processes of the server listen on off the loopback device."""
    processes = [psutil.Process(server.process.pid)]
    processes += processes[0].children(recursive=True)
    return [
        f"{one.laddr.ip}:{one.laddr.port}"
        for process in processes
        for one in process.net_connections("inet")
        if one.status == psutil.CONN_LISTEN and not one.laddr.ip.startswith("127.")
    ]


def at_idle(server: Served, num_shard: int) -> dict[str, float]:
    """What should be 0 once nobody asks for anything."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    return {
        "blocks held at idle": server.wait_for("chipset_kv_blocks_held", 0),
        "requests running at idle": server.wait_for("tgi_batch_current_size", 0),
        "processes beside engine and workers": len(processes) - 1 - num_shard,
        "listeners off loopback": len(listeners(server)),
    }


def at_the_end(server: Served) -> dict[str, float]:
    """What should be 0 once the server was told to end."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(30)
    _, alive = psutil.wait_procs(processes, timeout=5)
    return {"exit code": code, "processes left": len(alive)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--times", type=int, default=10, help="kills of a worker, and of the engine"
    )
    parser.add_argument("--stops", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--num-shard", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    flags = (*FLAGS, "--num-shard", str(options.num_shard), "--max-restarts", "1000")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder
        before = left_behind(folder)
        with served(Path(folder) / "log", *flags) as server:
            figures, seen, is_right = asyncio.run(soak(server, options))
            checks = at_idle(server, options.num_shard)
            checks["folders of sockets beside the engine's"] = (
                len(left_behind(folder)["sockets"] - before["sockets"]) - 1
            )
            checks |= at_the_end(server)
        for what, names in left_behind(folder).items():
            checks[f"{what} left"] = len(names - before[what])
    checks["answers that are no typed error"] = sum(seen.wrong.values())
    checks["texts that are wrong afterwards"] = int(not is_right)
    report(figures, seen, checks)
    if any(checks.values()):
        raise SystemExit(1)


def report(figures: Figures, seen: Seen, checks: dict[str, float]) -> None:
    for what, noticed in figures.noticed.items():
        again = figures.ready_again[what]
        print(
            f"{what}: {len(noticed)} times, noticed within {max(noticed):.2f} s, "
            f"ready again after {statistics.median(again):.1f} s (at most {max(again):.1f})"
        )
    print(f"{seen.whole} whole answers, {seen.equal} of them with the text from before")
    print(f"typed errors: {dict(seen.errors)}; others: {dict(seen.wrong)}")
    for name, value in checks.items():
        print(f"{name}: {value:g}")


if __name__ == "__main__":
    main()
