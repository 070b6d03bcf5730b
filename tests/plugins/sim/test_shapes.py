"""Buckets: few, and each step in one that holds it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipset.backends.conformance.suite import small_model
from chipset.backends.errors import TooLarge
from chipset.backends.options import EngineOptions
from chipset.backends.registry import Registry
from chipset.backends.shapes import BatchShape, Bucket, Phase, ShapePolicy
from chipset.plugins.sim.shapes import sizes

from .sims import SIMS

REGISTRY = Registry.discover()
MODEL = small_model(max_context=2048)


def policy_of(name: str, **options: object) -> tuple[ShapePolicy, int]:
    """And the block size."""
    plugin = REGISTRY.select(name).plugin
    resolved = plugin.resolve(EngineOptions(**options), MODEL, plugin.capabilities(plugin.probe()))
    return plugin.shapes(resolved, MODEL), resolved.block_size


POLICIES = {name: policy_of(name) for name in SIMS}


@st.composite
def shapes(draw: st.DrawFn, name: str) -> BatchShape:
    """A step that the policy allows."""
    policy, block_size = POLICIES[name]
    batch = policy.batch
    phase = draw(st.sampled_from(list(Phase) if batch.mixed else [Phase.PREFILL, Phase.DECODE]))
    most = batch.max_rows
    if phase is Phase.PREFILL and batch.max_prefills:
        most = batch.max_prefills
    rows = draw(st.integers(1 if phase is not Phase.MIXED else 2, most))
    counts = [1] * rows
    if phase is not Phase.DECODE:
        counts[-1] = draw(st.integers(1, batch.max_tokens - rows + 1))
    ends = [draw(st.integers(count, batch.max_context)) for count in counts]
    return BatchShape(
        phase=phase,
        num_rows=rows,
        num_tokens=sum(counts),
        num_logits=draw(st.integers(0, rows)),
        max_query=max(counts),
        max_context=max(ends),
        max_computed=max(end - count for end, count in zip(ends, counts, strict=True)),
        num_blocks=sum(-(-end // block_size) for end in ends),
        max_block=40,
    )


def fit(policy: ShapePolicy, shape: BatchShape) -> Bucket | TooLarge:
    try:
        return policy.fit(shape)
    except TooLarge as error:
        return error


def holds(bucket: Bucket, shape: BatchShape, block_size: int) -> bool:
    return (
        bucket.num_rows >= shape.num_rows
        and bucket.num_tokens >= shape.num_tokens
        and bucket.num_logits >= max(1, shape.num_logits)
        and bucket.max_query >= shape.max_query
        and bucket.blocks_per_row * block_size >= shape.max_context
        and (not bucket.num_blocks or bucket.num_blocks >= shape.num_blocks)
        and bucket.phase in (shape.phase, Phase.MIXED)
    )


@pytest.mark.parametrize("policy_name", SIMS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_step_gets_a_bucket_that_holds_it_or_a_way_to_shrink(
    policy_name: str, data: st.DataObject
) -> None:
    policy, block_size = POLICIES[policy_name]
    shape = data.draw(shapes(policy_name))
    found = fit(policy, shape)
    if isinstance(found, TooLarge):
        assert shape.num_rows > 1, "one row always fits"
        assert found.axis == "rows"
        assert 0 < found.limit < shape.num_rows
        return
    bucket = found
    assert holds(bucket, shape, block_size)
    is_captured = policy_name == "sim-gpu" and shape.phase is not Phase.DECODE
    assert is_captured or bucket in policy.buckets(40)
    if policy.batch.token_layout == "rows":
        assert bucket.num_tokens == bucket.num_rows * bucket.max_query
        if shape.phase is Phase.PREFILL:
            assert bucket.context_blocks * block_size >= shape.max_computed


@pytest.mark.parametrize("policy_name", SIMS)
def test_warm_up_is_short(policy_name: str) -> None:
    policy, _ = POLICIES[policy_name]
    buckets = policy.buckets(40)
    assert len(set(buckets)) == len(buckets) <= 40
    variants = policy.draw_variants()
    assert frozenset() in variants
    plugin = REGISTRY.select(policy_name).plugin
    assert plugin.capabilities(plugin.probe()).features in variants


@pytest.mark.parametrize("policy_name", SIMS)
@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("context", [1, 33, 100])
def test_odd_limits_have_buckets_too(policy_name: str, rows: int, context: int) -> None:
    policy, block_size = policy_of(
        policy_name, max_batch_rows=rows, max_context=context, max_batch_tokens=100
    )
    assert policy.batch.max_rows == rows
    for phase, query in ((Phase.PREFILL, context), (Phase.DECODE, 1)):
        shape = BatchShape(
            phase=phase,
            num_rows=1,
            num_tokens=query,
            num_logits=1,
            max_query=query,
            max_context=context,
            max_computed=context - query,
            num_blocks=-(-context // block_size),
            max_block=1,
        )
        assert holds(policy.fit(shape), shape, block_size)


def test_sizes_grow_by_a_factor_and_end_with_the_most() -> None:
    assert sizes(1, 16, 2) == [1, 2, 4, 8, 16]
    assert sizes(1, 10, 2) == [1, 2, 4, 8, 10]
    assert sizes(5, 3, 2) == [3]
