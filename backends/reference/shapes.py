"""Shapes of devices that compile: a finite list of buckets, of which each step gets the cheapest. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import Axis, TooLarge
from ..shapes import BatchPolicy, BatchShape, Bucket, Phase, ShapePolicy


def sizes(least: int, most: int, factor: int) -> list[int]:
    """least, least * factor, … below `most`, then `most`."""
    found = []
    while least < most:
        found.append(least)
        least *= factor
    return [*found, most]


class FiniteShapes(ShapePolicy):
    """The cheapest of the buckets `listed`, which must hold the largest row alone with one row of logits.

    `variants` are those of draw_variants(); none: any will do.
    """

    def __init__(
        self,
        batch: BatchPolicy,
        block_size: int,
        variants: Sequence[frozenset[str]],
        listed: Sequence[Bucket],
    ) -> None:
        self.batch = batch
        self.block_size = block_size
        self.variants = tuple(variants)
        self.listed = tuple(listed)

    def fit(self, shape: BatchShape) -> Bucket:
        """See ShapePolicy.fit."""
        policy = self.batch
        limits: tuple[tuple[Axis, int, int], ...] = (
            ("rows", shape.num_rows, policy.max_rows),
            ("tokens", shape.num_tokens, policy.max_tokens),
            ("context", shape.max_context, policy.max_context),
        )
        for axis, needed, limit in limits:
            if needed > limit:
                raise TooLarge(axis, limit)
        left = [b for b in self.listed if b.phase in (shape.phase, Phase.MIXED)]
        for axis, needed, held in self._axes(shape):
            enough = [bucket for bucket in left if held(bucket) >= needed]
            if not enough:
                raise TooLarge(axis, max(map(held, left)))
            left = enough
        return min(left, key=self._cost)

    def buckets(self, num_blocks: int) -> Sequence[Bucket]:  # noqa: ARG002 - whatever the size
        """See ShapePolicy.buckets."""
        return self.listed

    def draw_variants(self) -> Sequence[frozenset[str]]:
        """See ShapePolicy.draw_variants."""
        return self.variants

    def _axes(self, shape: BatchShape) -> list[tuple[Axis, int, Callable[[Bucket], int]]]:
        """What a bucket must hold: axis, how much, and how much a bucket holds of it."""
        size = self.block_size
        axes: list[tuple[Axis, int, Callable[[Bucket], int]]] = [
            ("query", shape.max_query, lambda bucket: bucket.max_query),
            ("rows", shape.num_rows, lambda bucket: bucket.num_rows),
            ("logits", shape.num_logits, lambda bucket: bucket.num_logits),
            ("context", shape.max_context, lambda bucket: bucket.blocks_per_row * size),
        ]
        if self.batch.token_layout == "packed":
            axes.append(("tokens", shape.num_tokens, lambda bucket: bucket.num_tokens))
        elif shape.phase is Phase.PREFILL:
            axes.append(("context", shape.max_computed, lambda b: b.context_blocks * size))
        else:
            axes.append(("blocks", shape.num_blocks, lambda bucket: bucket.num_blocks))
        return axes

    def _cost(self, bucket: Bucket) -> tuple[int, ...]:
        """Keys read, roughly; then what else is paid for."""
        columns = (bucket.context_blocks or bucket.blocks_per_row) * self.block_size
        keys = bucket.num_tokens * (bucket.max_query + columns)
        return (keys, bucket.num_blocks, bucket.num_rows, bucket.num_tokens)
