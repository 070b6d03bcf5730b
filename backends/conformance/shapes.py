"""ShapePolicy and BatchPolicy: every step that a scheduler may compose has a bucket, and warm-up knows it."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from ..capabilities import Capabilities
from ..errors import Incompatible, TooLarge
from ..options import EngineOptions
from ..plugin import Launch, Plugin
from ..shapes import BatchShape, Bucket, Phase
from .composing import Composer, Part, shape_of, shrink
from .session import make_launch
from .suite import Suite, small_model

OPTIONS = {
    "defaults": EngineOptions(),
    "one row": EngineOptions(max_batch_rows=1),
    "short texts": EngineOptions(max_batch_rows=3, max_context=100),
    "small steps": EngineOptions(max_batch_rows=5, max_batch_tokens=72),
}
MAX_BUCKETS = 1024
"""More would take hours to compile: an accelerator takes seconds for each."""
SIZES = ("num_rows", "num_tokens", "num_logits", "max_query", "blocks_per_row")
"""Of a bucket."""


class ShapesSuite(Suite):
    """The parent half's view of steps; nothing here touches a device."""

    @pytest.fixture(params=OPTIONS)
    def shaped(
        self, plugin: Plugin, capabilities: Capabilities, request: pytest.FixtureRequest
    ) -> Launch:
        """A launch for each of OPTIONS."""
        dtype = self.base_dtype(capabilities)
        try:
            options = replace(OPTIONS[request.param], dtype=dtype)
            return make_launch(plugin, small_model(dtype=dtype), options)
        except Incompatible as error:
            pytest.skip(f"these options are refused: {error}")

    @property
    def num_composed(self) -> int:
        """How many steps a case composes."""
        return 150 if self.is_quick else 1500

    def test_the_policy_fits_the_options(self, shaped: Launch) -> None:
        """A slot for each row, and texts as long as was promised."""
        policy, options = shaped.shapes.batch, shaped.options
        assert 1 <= policy.max_rows <= options.max_batch_rows, "more rows than request slots"
        assert policy.max_tokens >= 1
        assert policy.max_context >= options.max_context, "texts cannot grow to max_context"
        assert policy.max_prefills is None or policy.max_prefills >= 1
        if policy.token_layout == "rows":
            assert not policy.mixed, "rows are never mixed"
        if not shaped.capabilities.chunked_prefill:
            assert options.max_batch_tokens >= options.max_context
            assert policy.max_tokens >= options.max_context, "a long prompt fits no step"

    def test_a_step_has_a_bucket_that_holds_it_or_is_too_large_along_an_axis(
        self, shaped: Launch
    ) -> None:
        """Whatever the policy lets a scheduler compose; equal shapes have equal buckets."""
        targets = "targets" in shaped.capabilities.features
        for num_blocks in _pools(shaped):
            composer = Composer(shaped, num_blocks, seed=num_blocks)
            found: dict[BatchShape, Bucket] = {}
            for _ in range(self.num_composed):
                shape = composer.shape(targets=targets)
                try:
                    bucket = shaped.shapes.fit(shape)
                except TooLarge as error:
                    _expect_sensible(error, shape)
                else:
                    _expect_holds(shaped, bucket, shape)
                    found[shape] = bucket
            again = {shape: shaped.shapes.fit(shape) for shape in reversed(found)}
            assert again == found, "equal shapes get other buckets later"

    def test_one_row_with_one_row_of_logits_always_has_a_bucket(self, shaped: Launch) -> None:
        """Whatever it brings and whatever was computed before."""
        composer = Composer(shaped, _pools(shaped)[0], seed=1)
        size, longest = shaped.options.block_size, composer.max_context
        ends = {*range(2, longest, max(1, longest // 40)), longest, size, size + 1, 2 * size - 1}
        parts = [
            Part(start=end - 1, count=1, num_logits=1, is_decode=True)
            for end in ends
            if 2 <= end <= longest
        ]
        parts += [Part(start=0, count=end, num_logits=1) for end in ends if end <= longest]
        if shaped.capabilities.chunked_prefill:
            parts += [
                Part(start=end - count, count=count, num_logits=logits)
                for end in ends
                for count in (1, 2, size - 1, size + 1, shaped.shapes.batch.max_tokens)
                for logits in (0, 1)
                if count < end <= longest
            ]
        for part in parts:
            if part.count > shaped.shapes.batch.max_tokens:
                continue
            shape = composer.shape_of([part])
            _expect_holds(shaped, shaped.shapes.fit(shape), shape)

    def test_a_step_made_smaller_as_it_is_told_fits_in_the_end(self, shaped: Launch) -> None:
        """Cut along the axis that is named, or left without its last row."""
        composer = Composer(shaped, _pools(shaped)[-1], seed=2)
        for _ in range(self.num_composed):
            parts = composer.parts()
            for _ in range(2 * len(parts) + 8):
                shape = composer.shape_of(parts)
                try:
                    shaped.shapes.fit(shape)
                except TooLarge as error:
                    _expect_sensible(error, shape)
                    chunked = shaped.capabilities.chunked_prefill
                    parts = shrink(parts, error, chunked=chunked)
                else:
                    break
            else:
                pytest.fail(f"a step is made smaller without end: {shape}")

    def test_more_of_anything_never_gives_a_smaller_bucket(self, shaped: Launch) -> None:
        """Monotone, among steps of one phase."""
        composer = Composer(shaped, _pools(shaped)[-1], seed=3)
        for _ in range(self.num_composed):
            parts = composer.parts()
            larger = composer.shape_of(parts)
            smaller = shape_of(composer.smaller(parts), composer.block_size)
            smaller = replace(smaller, max_block=min(larger.max_block, smaller.num_blocks))
            try:
                above, below = shaped.shapes.fit(larger), shaped.shapes.fit(smaller)
            except TooLarge:
                continue
            for name in SIZES:
                assert getattr(below, name) <= getattr(above, name), (
                    f"{name} of {below} for {smaller} is above that of {above} for {larger}"
                )

    def test_warm_up_knows_every_bucket(self, shaped: Launch) -> None:
        """Few enough to be compiled, each once; a phase that it names has no others."""
        for num_blocks in _pools(shaped):
            buckets = shaped.shapes.buckets(num_blocks)
            self.require(buckets, "shapes are dynamic here")
            declared = set(buckets)
            assert len(declared) == len(buckets), "a bucket is named twice"
            assert len(buckets) <= MAX_BUCKETS, f"{len(buckets)} buckets would be compiled"
            assert set(shaped.shapes.buckets(num_blocks)) == declared, "others at each call"
            phases = {bucket.phase for bucket in buckets}
            composer = Composer(shaped, num_blocks, seed=4)
            targets = "targets" in shaped.capabilities.features
            for _ in range(self.num_composed):
                shape = composer.shape(targets=targets)
                try:
                    bucket = shaped.shapes.fit(shape)
                except TooLarge:
                    continue
                assert bucket.phase not in phases or bucket in declared, (
                    f"{bucket} for {shape} is not among the {len(buckets)} of warm-up"
                )

    def test_draw_variants_hold_nothing_and_everything(self, shaped: Launch) -> None:
        """So that there is one for whatever rows need."""
        variants = shaped.shapes.draw_variants()
        self.require(variants, "any set of features will do here")
        assert len(set(variants)) == len(variants), "a variant is named twice"
        assert frozenset() in variants
        assert shaped.capabilities.features in variants

    def test_the_largest_steps_have_buckets(self, shaped: Launch) -> None:
        """They are run when memory is profiled, on a cache whose only block is block 1."""
        largest = shaped.shapes.largest()
        if shaped.capabilities.kv_budget == "profile":
            assert largest, "a profiled budget needs a step to run"
        policy = shaped.shapes.batch
        for shape in largest:
            assert shape.num_rows <= policy.max_rows
            assert shape.num_tokens <= policy.max_tokens
            assert shape.max_context <= policy.max_context
            assert shape.max_block <= 1, "the cache has two blocks"
            _expect_holds(shaped, shaped.shapes.fit(shape), shape)


def _pools(launch: Launch) -> tuple[int, int]:
    """Numbers of blocks: one long text and no more, and all rows as long as may be."""
    longest = -(-launch.options.max_context // launch.options.block_size)
    return 1 + longest, 1 + longest * launch.shapes.batch.max_rows


def _expect_holds(launch: Launch, bucket: Bucket, shape: BatchShape) -> None:
    policy, size = launch.shapes.batch, launch.options.block_size
    for field in fields(Bucket):
        value = getattr(bucket, field.name)
        assert field.name == "phase" or type(value) is int, f"{field.name} is {value!r}, no int"
    least = {
        "num_rows": shape.num_rows,
        "num_tokens": shape.num_tokens,
        "num_logits": max(1, shape.num_logits),
        "max_query": shape.max_query,
        "blocks_per_row": -(-shape.max_context // size),
    }
    for name, wanted in least.items():
        found = getattr(bucket, name)
        assert found >= wanted, f"{name} is {found}, too few for {wanted} of {shape}"
    assert bucket.phase in (shape.phase, Phase.MIXED), f"{bucket.phase} for {shape}"
    assert policy.mixed or bucket.phase is not Phase.MIXED, "mixed, which the policy forbids"
    if policy.token_layout == "rows":
        assert bucket.num_tokens == bucket.num_rows * bucket.max_query, f"no rows layout: {bucket}"
    if bucket.num_blocks:
        assert bucket.num_blocks >= shape.num_blocks, f"too few packed blocks for {shape}"
    if bucket.context_blocks:
        assert bucket.context_blocks * size >= shape.max_computed, f"too few columns for {shape}"


def _expect_sensible(error: TooLarge, shape: BatchShape) -> None:
    axes = {
        "rows": shape.num_rows,
        "tokens": shape.num_tokens,
        "query": shape.max_query,
        "context": max(shape.max_context, shape.max_computed),
        "blocks": max(shape.num_blocks, shape.max_block),
        "logits": shape.num_logits,
    }
    alone = shape.num_rows == 1 and shape.num_logits <= 1
    assert not alone, f"a row alone is refused ({error}): {shape}"
    assert error.axis in axes, f"no axis {error.axis!r}"
    assert 1 <= error.limit < axes[error.axis], f"{error}, where the step has less: {shape}"
