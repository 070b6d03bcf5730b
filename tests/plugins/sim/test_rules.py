"""Every rule of composition is broken once, and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from chipset.backends.conformance.rows import Row
from chipset.backends.conformance.session import Session
from chipset.backends.errors import PluginError
from chipset.backends.step import StepBatch
from chipset.plugins.sim.rules import RuleBroken

from .sims import decode, make_session, prompt


def refused(session: Session, batch: StepBatch) -> str:
    """The rule that `batch` breaks."""
    with pytest.raises(RuleBroken) as caught:
        session.backend.prepare(batch)
    assert isinstance(caught.value, PluginError)
    assert caught.value.rule in str(caught.value)
    return caught.value.rule


def changed(array: np.ndarray, index: int, value: int) -> np.ndarray:
    copy = array.copy()
    copy[index] = value
    return copy


def test_well_composed_steps_are_taken(session: Session) -> None:
    for rows in ([prompt()], [decode()], [decode(), decode(block=2, slot=1)]):
        session.backend.prepare(session.batch(rows))


@pytest.mark.parametrize("mixing", ["sim-gaudi", "sim-neuron"])
def test_mixed_steps_are_refused_where_nothing_mixes(mixing: str) -> None:
    session = make_session(mixing)
    bucket = session.fit([decode(), decode(block=2, slot=1)])
    rows = [decode(), replace(decode(block=2, slot=1), is_decode=False)]
    assert refused(session, session.batch(rows, bucket=bucket)) == "mixing"


@pytest.mark.parametrize("free", ["sim-gpu", "sim-tpu"])
def test_mixed_steps_are_taken_where_they_may_mix(free: str) -> None:
    session = make_session(free)
    session.backend.prepare(session.batch([decode(), prompt(block=2, slot=1)]))


@pytest.mark.parametrize(("named", "most"), [("sim-gaudi", 2), ("sim-neuron", 1)])
def test_more_prefills_than_a_step_may_have_are_refused(named: str, most: int) -> None:
    session = make_session(named, max_batch_rows=8)
    rows = [prompt(1, block=n + 1, slot=n) for n in range(most + 1)]
    bucket = session.fit([replace(row, is_decode=True) for row in rows])
    batch = session.batch(rows, bucket=replace(bucket, phase="prefill"))
    assert refused(session, batch) == "prefills a step"


def test_a_chunk_is_refused_where_prompts_are_computed_whole() -> None:
    session = make_session("sim-neuron")
    assert refused(session, session.batch([prompt()], logits="none")) == "prompts whole"


def test_decode_rows_behind_others_are_refused() -> None:
    session = make_session("sim-tpu")
    batch = session.batch([decode(), prompt(4, block=2, slot=1)])
    swapped = replace(
        batch,
        query_len=batch.query_len[[1, 0, 2, 3]],
        context_len=batch.context_len[[1, 0, 2, 3]],
    )
    assert refused(session, swapped) == "decode rows first"


def test_a_phase_that_is_not_the_buckets_is_refused() -> None:
    session = make_session("sim-gaudi")
    batch = session.batch([decode()])
    prefilling = replace(batch, bucket=replace(batch.bucket, phase="prefill"))
    assert refused(session, prefilling) == "phase"


BREAK: dict[str, Callable[[StepBatch], StepBatch]] = {
    "padding rows are empty": lambda b: replace(b, context_len=changed(b.context_len, -1, 3)),
    "one slot a row": lambda b: replace(b, row_slot=np.zeros_like(b.row_slot)),
    "draw variants": lambda b: replace(
        b, sampling=replace(b.sampling, features=frozenset({"bias"}))
    ),
    "null block": lambda b: replace(b, block_table=[np.zeros_like(t) for t in b.block_table]),
    "one writer a place": lambda b: replace(
        b, block_table=[np.full_like(t, 3) for t in b.block_table]
    ),
    "context": lambda b: replace(b, context_len=changed(b.context_len, 0, 65)),
    "host arrays": lambda b: replace(b, token_ids=b.token_ids.astype(np.int64)),
}


@pytest.mark.parametrize("rule", BREAK)
def test_a_batch_that_breaks_a_rule_of_layout_is_refused(session: Session, rule: str) -> None:
    rows = [decode(), decode(block=2, slot=1), decode(block=4, slot=2)]
    assert refused(session, BREAK[rule](session.batch(rows))) == rule


def test_token_slots_belong_to_overlapped_steps(session: Session) -> None:
    batch = session.batch([decode()])
    has_slots = session.launch.capabilities.overlapped_steps
    slots = None if has_slots else np.full(batch.bucket.num_tokens, -1, np.int32)
    assert (batch.token_slot is not None) == has_slots
    assert refused(session, replace(batch, token_slot=slots)) == "token slots"


def test_more_rows_and_tokens_than_the_policy_are_refused(session: Session) -> None:
    policy = session.launch.shapes.batch
    rows: list[Row] = [decode(block=n + 1, slot=n) for n in range(policy.max_rows)]
    batch = session.batch(rows)
    assert refused(session, replace(batch, num_rows=9, num_decode_rows=9)) == "rows a step"
    assert refused(session, replace(batch, num_tokens=65)) == "tokens a step"


def test_more_blocks_in_use_than_the_bucket_lists_are_refused() -> None:
    session = make_session("sim-gaudi", max_context=512)
    rows = [Row(token_ids=(7,), start=300, blocks=((1, 2, 3),), slot=0, is_decode=True)]
    bucket = session.fit([decode()])
    assert bucket.num_blocks < 3
    assert refused(session, session.batch(rows, bucket=bucket)) == "packed blocks"
