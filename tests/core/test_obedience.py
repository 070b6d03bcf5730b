"""The scheduler composes what each simulated device allows: seen in the steps that reach the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chipset.backends.options import EngineOptions
from chipset.backends.plugin import Plugin
from chipset.backends.registry import Registry
from chipset.backends.step import StepBatch
from chipset.core.conformance.checkpoint import FULL, VOCAB_SIZE, make_checkpoint
from chipset.core.conformance.suite import one_thread, running
from chipset.core.conformance.traffic import Arrival, make_submit, random_traffic, serve
from chipset.core.engine import Engine

SIMULATORS = ("sim-gpu", "sim-gaudi", "sim-neuron", "sim-tpu")
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
TRAFFIC = random_traffic(24, vocab_size=VOCAB_SIZE - 2, max_prompt=120, max_new=40, seed=11)


class Seen:
    """The steps of one engine, and the order in which its backend was called."""

    def __init__(self) -> None:
        self.steps: list[StepBatch] = []
        self.calls: list[str] = []

    def follow(self, engine: Engine) -> None:
        prepare = engine.runner.backend.prepare

        def seen(batch: StepBatch) -> Any:
            self.steps.append(batch)
            return prepare(batch)

        engine.runner.backend.prepare = seen  # type: ignore[method-assign]


def plugin(name: str) -> Plugin:
    return Registry.discover().select(name).plugin


@contextmanager
def engine(name: str, folder: Path, kv_tokens: int = 768, rows: int = 8) -> Iterator[Engine]:
    options = EngineOptions(
        dtype="float32",
        max_context=256,
        max_batch_rows=rows,
        kv_bytes=kv_tokens * TOKEN_BYTES,
    )
    with running(plugin(name), make_checkpoint(FULL, folder), options) as started, one_thread():
        yield started


@pytest.mark.parametrize("name", SIMULATORS)
def test_every_step_keeps_the_policy(name: str, tmp_path: Path) -> None:
    seen = Seen()
    with engine(name, tmp_path) as started:
        policy = started.scheduler.shapes.batch
        seen.follow(started)
        answers = serve(started, TRAFFIC)
        failed = started.stats().failed_steps
    assert failed == 0
    assert all(a.finish_reason == "length" for n, a in answers.items() if not TRAFFIC[n].leaves)
    most_rows = 0
    for batch in seen.steps:
        num_prefills = batch.num_rows - batch.num_decode_rows
        assert batch.num_rows <= policy.max_rows
        assert batch.num_tokens <= policy.max_tokens
        assert int(batch.context_len.max()) <= policy.max_context
        assert (batch.query_len[: batch.num_decode_rows] == 1).all(), "decode rows come first"
        if policy.max_prefills is not None:
            assert num_prefills <= policy.max_prefills
        if not policy.mixed:
            assert 0 in (num_prefills, batch.num_decode_rows)
        most_rows = max(most_rows, batch.num_rows)
    assert most_rows > 1, "no step had more than one row"


@pytest.mark.parametrize("name", ["sim-gpu", "sim-tpu"])
def test_rows_mix_where_they_may(name: str, tmp_path: Path) -> None:
    seen = Seen()
    with engine(name, tmp_path) as started:
        seen.follow(started)
        serve(started, TRAFFIC)
    assert any(0 < batch.num_decode_rows < batch.num_rows for batch in seen.steps)


def test_a_device_that_cannot_preempt_gets_its_worst_case_reserved(tmp_path: Path) -> None:
    """The same scarce blocks: one device puts requests back, the other lets them wait."""
    preemptions, most = {}, {}
    texts = [Arrival(submit=make_submit(n, range(n, n + 20), 100)) for n in range(8)]
    for name in ("sim-tpu", "sim-neuron"):
        seen = Seen()
        with engine(name, tmp_path / name, kv_tokens=448) as started:
            seen.follow(started)
            answers = serve(started, texts)
            preemptions[name] = started.stats().preemptions
        assert all(len(answer.ids) == 100 for answer in answers.values())
        most[name] = max(batch.num_rows for batch in seen.steps)
    assert preemptions["sim-tpu"] > 0
    assert preemptions["sim-neuron"] == 0
    assert most["sim-neuron"] < most["sim-tpu"]


def test_a_prompt_is_never_cut_where_it_must_be_computed_at_once(tmp_path: Path) -> None:
    seen = Seen()
    with engine("sim-neuron", tmp_path) as started:
        seen.follow(started)
        serve(started, TRAFFIC)
    prefills = [b for b in seen.steps if b.num_decode_rows == 0]
    assert prefills
    for batch in prefills:
        assert batch.num_rows == 1
        assert batch.num_logits == 1, "what draws nothing is a chunk"


def test_long_prompts_come_in_chunks_where_that_is_served(tmp_path: Path) -> None:
    seen = Seen()
    with engine("sim-gaudi", tmp_path) as started:
        seen.follow(started)
        limit = started.scheduler.shapes.batch.max_tokens
        serve(started, [Arrival(submit=make_submit(0, np.arange(230) % 300, 3))])
    if limit < 230:
        assert seen.steps[0].num_logits == 0
    assert sum(int(b.query_len.sum()) for b in seen.steps if not b.num_decode_rows) == 230


@pytest.mark.parametrize("name", SIMULATORS)
def test_the_cache_has_its_size_before_anything_is_compiled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen()
    made = plugin(name)
    create = made.create

    def followed(launch: Any) -> Any:
        backend = create(launch)
        allocate, warm_up = backend.kv.allocate, backend.compiler.warm_up
        budget = backend.kv.budget

        def allocates(plans: Any) -> Any:
            seen.calls.append(f"allocate {plans[0].num_blocks}")
            return allocate(plans)

        def warms_up(*arguments: Any) -> Any:
            seen.calls.append("warm_up")
            return warm_up(*arguments)

        def budgets(*arguments: Any) -> Any:
            seen.calls.append("budget")
            return budget(*arguments)

        monkeypatch.setattr(backend.kv, "allocate", allocates)
        monkeypatch.setattr(backend.kv, "budget", budgets)
        monkeypatch.setattr(backend.compiler, "warm_up", warms_up)
        return backend

    monkeypatch.setattr(made, "create", followed)
    options = EngineOptions(dtype="float32", max_context=256, max_batch_rows=4)
    with running(made, make_checkpoint(FULL, tmp_path), options):
        pass
    kept = [call for call in seen.calls if call != "allocate 2"]  # the cache of a measured step
    assert [call.split()[0] for call in kept] == ["budget", "allocate", "warm_up"]
