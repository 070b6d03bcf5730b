"""Each test of the end-to-end half fails for a backend that is broken in the way it looks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chipset.backends.backend import Backend
from chipset.backends.plugin import Launch, Plugin
from chipset.core.conformance import EngineConformance
from chipset.plugins.cpu.plugin import CPUPlugin

Break = Callable[[Backend], None]


class Broken(CPUPlugin):
    """The CPU's plugin, whose backend is broken once it is made."""

    def __init__(self, break_it: Break) -> None:
        super().__init__()
        self.break_it = break_it

    def create(self, launch: Launch) -> Backend:
        backend = super().create(launch)
        self.break_it(backend)
        return backend


def draws_the_second_best(backend: Backend) -> None:
    draw = type(backend.sampler).__call__

    def second(self: Any, logits: torch.Tensor, inputs: Any, cache: Any) -> Any:
        best = logits.argmax(-1, keepdim=True)
        # only where the best one is a small id, so that the text goes wrong late and seldom
        masked = torch.where(best < 8, logits.scatter(1, best, -1e9), logits)
        return draw(self, masked, inputs, cache)

    backend.sampler = type("Second", (type(backend.sampler),), {"__call__": second})(5)


def waits_twice(backend: Backend) -> None:
    prepare = backend.prepare

    def slow(batch: Any) -> Any:
        backend.runtime.synchronize()
        return prepare(batch)

    backend.prepare = slow  # type: ignore[method-assign]


def reads_a_block_of_another(backend: Backend) -> None:
    prepare = backend.prepare

    def shifted(batch: Any) -> Any:
        for table in batch.block_table:
            # the second block of every row is the first one
            if table.shape[1] > 1:
                table[:, 1] = table[:, 0]
        return prepare(batch)

    backend.prepare = shifted  # type: ignore[method-assign]


def calls_everything_finite(backend: Backend) -> None:
    fetch = backend.runtime.fetch
    backend.runtime.fetch = lambda output: fetch(  # type: ignore[method-assign]
        replace(output, finite=torch.ones_like(output.finite))
    )


def spreads_what_is_not_finite(backend: Backend) -> None:
    fetch = backend.runtime.fetch
    backend.runtime.fetch = lambda output: fetch(  # type: ignore[method-assign]
        replace(output, finite=output.finite & output.finite.all())
    )


def ignores_the_seed(backend: Backend) -> None:
    prepare = backend.prepare

    def unseeded(batch: Any) -> Any:
        if batch.sampling.seed is not None:
            batch.sampling.seed[:] = 0
        return prepare(batch)

    backend.prepare = unseeded  # type: ignore[method-assign]


def shifts_logprobs(backend: Backend) -> None:
    fetch = backend.runtime.fetch

    def shifted(output: Any) -> Any:
        if output.logprob is not None:
            output = replace(output, logprob=output.logprob - 0.1)
        return fetch(output)

    backend.runtime.fetch = shifted  # type: ignore[method-assign]


def blames_the_wrong_row(backend: Backend) -> None:
    run = backend.runtime.classify
    seen: list[object] = []

    def classify(error: BaseException) -> Any:
        seen.append(error)
        return run(error) if len(seen) < 3 else "unknown"

    backend.runtime.classify = classify  # type: ignore[method-assign]


class Quick(EngineConformance):
    is_quick = True


def call(test: str, plugin: Plugin, folder: Path, case: str | None) -> dict[str, object]:
    """One test of the suite, as pytest would call it; what it recorded."""
    recorded: dict[str, object] = {}
    arguments: dict[str, object] = {
        "plugin": plugin,
        "capabilities": plugin.capabilities(plugin.probe()),
        "tmp_path": folder,
    }
    if case is not None:
        arguments |= {"record_property": recorded.__setitem__}
        arguments["kind" if "traffic" in test else "fault"] = case
    getattr(Quick(), test)(**arguments)
    return recorded


TRAFFIC = "test_random_traffic_gives_the_text_of_cpu"
DRAWN = "test_drawn_text_and_logprobs_follow_cpu"
POISONED = "test_a_poisoned_request_ends_alone"
CASES = [
    (TRAFFIC, "full", draws_the_second_best),
    (TRAFFIC, "full", waits_twice),
    (TRAFFIC, "full", reads_a_block_of_another),
    (TRAFFIC, "windowed", reads_a_block_of_another),
    (DRAWN, None, ignores_the_seed),
    (DRAWN, None, shifts_logprobs),
    (POISONED, "nan prompt", calls_everything_finite),
    (POISONED, "nan output", spreads_what_is_not_finite),
    (POISONED, "before", blames_the_wrong_row),
]


@pytest.mark.parametrize(
    ("test", "case", "break_it"), CASES, ids=[f"{c[1] or 'drawn'}-{c[2].__name__}" for c in CASES]
)
def test_a_broken_backend_is_caught(
    test: str, case: str | None, break_it: Break, tmp_path: Path
) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        call(test, Broken(break_it), tmp_path, case)


def test_an_unbroken_one_passes_and_says_what_was_seen(tmp_path: Path) -> None:
    recorded = call(TRAFFIC, Broken(lambda backend: None), tmp_path, "windowed")
    assert "40 of 40 texts equal" in str(recorded["figures"])
    assert "0 late compiles" in str(recorded["figures"])
