"""The whole plugin that others start from, as it is and with finite shapes, held to suites of the kit."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from chipset.backends.backend import Backend
from chipset.backends.conformance.plugin import PluginSuite
from chipset.backends.conformance.shapes import ShapesSuite
from chipset.backends.conformance.steps import StepsSuite
from chipset.backends.options import ModelSpec, ResolvedOptions
from chipset.backends.plugin import API_VERSION, Launch, Plugin, PluginInfo
from chipset.backends.reference.backend import ReferenceBackend
from chipset.backends.reference.compiler import BucketCompiler
from chipset.backends.reference.plugin import ReferencePlugin
from chipset.backends.reference.shapes import FiniteShapes, sizes
from chipset.backends.reference.telemetry import Counters, Counting
from chipset.backends.shapes import BatchPolicy, Bucket, Phase, ShapePolicy


class WholePlugin(ReferencePlugin):
    info = PluginInfo(
        name="whole", api_version=API_VERSION, distribution="tests", summary="as it comes"
    )


class BucketedPlugin(WholePlugin):
    """Every step of one row or more is padded to a few sizes."""

    def shapes(self, options: ResolvedOptions, model: ModelSpec) -> ShapePolicy:
        rows, tokens, context = (
            options.max_batch_rows,
            options.max_batch_tokens,
            options.max_context,
        )
        buckets = [
            Bucket(
                phase=Phase.MIXED,
                num_rows=rows,
                num_tokens=size,
                num_logits=max(rows, size),
                max_query=size,
                blocks_per_row=-(-context // options.block_size),
            )
            for size in sizes(4, tokens, 4)
        ]
        policy = BatchPolicy(max_rows=rows, max_tokens=tokens, max_context=context)
        features = self.capabilities(self.probe()).features
        return FiniteShapes(policy, options.block_size, [frozenset(), features], buckets)

    def create(self, launch: Launch) -> Backend:
        backend = ReferenceBackend(launch)
        backend.compiler = BucketCompiler()
        return backend


class TestWhole(PluginSuite, StepsSuite):
    is_quick = True

    def make_plugin(self) -> Plugin:
        return WholePlugin()


class TestBucketed(ShapesSuite, StepsSuite):
    is_quick = True

    def make_plugin(self) -> Plugin:
        return BucketedPlugin()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [((1, 16, 4), [1, 4, 16]), ((16, 9, 4), [9]), ((8, 8, 2), [8]), ((3, 20, 2), [3, 6, 12, 20])],
)
def test_sizes_grow_by_a_factor_up_to_the_most(
    arguments: tuple[int, int, int], found: list[int]
) -> None:
    assert sizes(*arguments) == found


def test_parts_that_count_share_the_counters_of_their_backend() -> None:
    counters, part, other = Counters(), Counting(), object()
    counters.give(part, other)
    part.counters["steps"] += 2
    told: Mapping[str, float] = counters.counters()
    assert told == {"steps": 2}
    assert not hasattr(other, "counters")
