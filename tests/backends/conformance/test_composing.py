"""Steps composed by chance obey what they were composed for."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chipset.backends.conformance.composing import Composer, Part, shrink
from chipset.backends.conformance.session import make_launch
from chipset.backends.conformance.suite import small_model
from chipset.backends.errors import TooLarge
from chipset.backends.options import EngineOptions
from chipset.backends.plugin import Launch
from chipset.backends.shapes import BatchPolicy, BatchShape, DynamicShapes, Phase

from .reference_plugin import CAPABILITIES, ReferencePlugin

LAUNCH = make_launch(ReferencePlugin(), small_model(), EngineOptions())


@st.composite
def launches(draw: st.DrawFn) -> Launch:
    policy = BatchPolicy(
        mixed=draw(st.booleans()),
        max_prefills=draw(st.sampled_from([None, 1, 3])),
        max_rows=draw(st.integers(1, 8)),
        max_tokens=draw(st.integers(1, 128)),
        max_context=draw(st.integers(2, 512)),
    )
    capabilities = replace(
        CAPABILITIES, chunked_prefill=draw(st.booleans()), prefix_cache=draw(st.booleans())
    )
    shapes = DynamicShapes(policy, LAUNCH.options.block_size)
    return replace(LAUNCH, shapes=shapes, capabilities=capabilities)


@given(launches(), st.integers(2, 40), st.integers(0, 2**32))
def test_a_step_is_one_that_the_policy_allows(launch: Launch, num_blocks: int, seed: int) -> None:
    composer, policy = Composer(launch, num_blocks, seed), launch.shapes.batch
    parts = composer.parts(targets=True)
    shape = composer.shape_of(parts)
    launch.shapes.fit(shape)
    kinds = [part.is_decode for part in parts]
    assert kinds == sorted(kinds, reverse=True)
    assert policy.mixed or shape.phase is not Phase.MIXED
    assert kinds.count(False) <= (policy.max_prefills or len(kinds))
    assert shape.max_block < num_blocks
    for part in parts:
        assert 0 <= part.num_logits <= part.count
        if part.is_decode:
            assert (part.count, part.num_logits) == (1, 1)
            assert part.start
        elif not launch.capabilities.chunked_prefill:
            assert part.start % composer.block_size == 0
            assert part.num_logits
            assert launch.capabilities.prefix_cache or not part.start


@given(launches(), st.integers(0, 2**32))
def test_a_smaller_step_has_no_more_of_anything(launch: Launch, seed: int) -> None:
    composer = Composer(launch, 40, seed)
    parts = composer.parts()
    larger, smaller = composer.shape_of(parts), composer.shape_of(composer.smaller(parts))
    assert smaller.phase is larger.phase
    for field in fields(BatchShape):
        if field.name not in ("phase", "max_block"):
            assert getattr(smaller, field.name) <= getattr(larger, field.name)


ROWS = [
    Part(start=4, count=1, num_logits=1, is_decode=True),
    Part(start=0, count=9, num_logits=1),
    Part(start=0, count=7, num_logits=1),
]


@pytest.mark.parametrize(
    ("error", "chunked", "counts"),
    [
        (TooLarge("query", 8), True, [1, 8, 7]),
        (TooLarge("query", 8), False, [1, 9]),
        (TooLarge("tokens", 12), True, [1, 9, 2]),
        (TooLarge("tokens", 12), False, [1, 9]),
        (TooLarge("tokens", 10), True, [1, 9]),
        (TooLarge("rows", 2), True, [1, 9]),
    ],
)
def test_a_step_is_cut_as_the_scheduler_cuts_it(
    error: TooLarge, chunked: bool, counts: list[int]
) -> None:
    assert [part.count for part in shrink(ROWS, error, chunked=chunked)] == counts
