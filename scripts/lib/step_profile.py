"""Where the time of one decode step goes: host phases of the engine, then torch's operations."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from chipset.backends.options import EngineOptions, SamplingParams
from chipset.core.engine import Engine
from chipset.core.files import ModelFiles
from chipset.core.messages import EngineLaunch, Submit
from chipset.core.startup import start_engine

NUM_STEPS = 20


def print_profile(files: ModelFiles, dtype: str, streams: list[int], prompt: int) -> None:
    """A table per number of streams."""
    options = EngineOptions(dtype=dtype, kv_bytes=2**30)
    launch = EngineLaunch(commands="", events="", files=files, backend="cpu", options=options)
    engine = start_engine(launch, lambda *_: None)
    for number in streams:
        _fill(engine, number, prompt)
        phases = _phases(engine)
        step_ms = phases.total() / NUM_STEPS
        print(f"{number} streams, {dtype}: one step {step_ms:.1f} ms")
        for name, total in phases.most_common():
            print(f"    {name:28} {total / NUM_STEPS:8.2f} ms  {total / phases.total():4.0%}")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(NUM_STEPS):
                engine.step()
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
        whole = sum(row.self_cpu_time_total for row in rows)
        for row in rows[:10]:
            share = row.self_cpu_time_total / whole
            calls = row.count / NUM_STEPS
            milliseconds = row.self_cpu_time_total / NUM_STEPS / 1000
            print(f"        {row.key:24} {milliseconds:8.2f} ms  {share:4.0%}  {calls:5.0f} calls")
        engine.cancel(range(number))
    engine.close()


def _fill(engine: Engine, number: int, prompt: int) -> None:
    """`number` requests past their prompts."""
    for request_id in range(number):
        engine.submit(
            Submit(
                request_id=request_id,
                prompt=[100 + request_id * 61 + i * 7 for i in range(prompt)],
                sampling=SamplingParams(),
                max_new_tokens=200,
                stop_ids=[],
            )
        )
    drawn: set[int] = set()
    while len(drawn) < number:
        drawn |= {output.request_id for output in engine.step()}


def _phases(engine: Engine) -> Counter[str]:
    """Milliseconds of NUM_STEPS steps, by the member that took them."""
    runner, scheduler = engine.runner, engine.scheduler
    taken: Counter[str] = Counter()
    originals: list[tuple[object, str, object]] = []

    def time_member(owner: Any, member: str, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, member)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                taken[name] += 1000 * (time.perf_counter() - start)  # type: ignore[assignment]

        originals.append((owner, member, function))
        setattr(owner, member, timed)

    time_member(scheduler, "schedule", "schedule")
    time_member(scheduler, "commit", "commit")
    time_member(runner.builder, "build", "build the batch")
    time_member(runner.backend, "prepare", "prepare")
    time_member(runner, "_model", "model")
    time_member(runner, "_draw", "draw")
    start = time.perf_counter()
    for _ in range(NUM_STEPS):
        engine.step()
    whole = 1000 * (time.perf_counter() - start)
    taken["the rest"] = whole - taken.total()  # type: ignore[assignment]
    for original in originals:
        setattr(*original)
    return taken
