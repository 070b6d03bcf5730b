"""Shapes of the simulators: captured decode sizes, and three families of finite buckets. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from ...backends.reference.shapes import FiniteShapes, sizes
from ...backends.shapes import BatchPolicy, BatchShape, Bucket, DynamicShapes, Phase

__all__ = [
    "CapturedShapes",
    "FiniteShapes",
    "prompt_buckets",
    "rows_buckets",
    "sizes",
    "token_buckets",
]

Variants = Sequence[frozenset[str]]


class CapturedShapes(DynamicShapes):
    """Decode steps are padded to captured numbers of rows; all others have exact sizes."""

    def __init__(self, batch: BatchPolicy, block_size: int, variants: Variants) -> None:
        super().__init__(batch, block_size)
        self.variants = variants
        self.rows = sizes(1, batch.max_rows, 2)
        self.blocks_per_row = -(-batch.max_context // block_size)

    def fit(self, shape: BatchShape) -> Bucket:
        """See ShapePolicy.fit."""
        exact = super().fit(shape)
        if shape.phase is not Phase.DECODE or shape.max_query > 1:
            return exact
        return self._captured(min(rows for rows in self.rows if rows >= shape.num_rows))

    def buckets(self, num_blocks: int) -> Sequence[Bucket]:  # noqa: ARG002 - whatever the size
        """See ShapePolicy.buckets."""
        return [self._captured(rows) for rows in self.rows]

    def draw_variants(self) -> Variants:
        """See ShapePolicy.draw_variants."""
        return self.variants

    def largest(self) -> Sequence[BatchShape]:
        """All rows and all tokens, one row as long as it may get. Nothing is captured by it."""
        policy = self.batch
        rows = min(policy.max_rows, policy.max_tokens)
        return [
            BatchShape(
                phase=Phase.MIXED,
                num_rows=rows,
                num_tokens=min(policy.max_tokens, rows * policy.max_context),
                num_logits=rows,
                max_query=min(policy.max_tokens - rows + 1, policy.max_context),
                max_context=policy.max_context,
                max_computed=policy.max_context - 1,
                num_blocks=rows * self.blocks_per_row,
                max_block=1,
            )
        ]

    def _captured(self, rows: int) -> Bucket:
        return Bucket(
            phase=Phase.DECODE,
            num_rows=rows,
            num_tokens=rows,
            num_logits=rows,
            max_query=1,
            blocks_per_row=self.blocks_per_row,
        )


def rows_buckets(batch: BatchPolicy, block_size: int) -> Iterator[Bucket]:
    """Rows layout: prefills by rows, query and context blocks; decodes by rows and blocks in use."""
    width = -(-batch.max_context // block_size)
    rows = sizes(1, batch.max_rows, 2)
    queries = sizes(min(32, batch.max_tokens), batch.max_tokens, 4)
    contexts = sorted({0, -(-width // 2), width})
    for num_rows, query, context in product(rows, queries, contexts):
        fits = num_rows * query <= batch.max_tokens
        if fits and num_rows <= (batch.max_prefills or batch.max_rows):
            yield Bucket(
                phase=Phase.PREFILL,
                num_rows=num_rows,
                num_tokens=num_rows * query,
                num_logits=num_rows,
                max_query=query,
                blocks_per_row=width,
                context_blocks=context,
            )
    for num_rows in rows:
        for num_blocks in sorted({num_rows, num_rows * -(-width // 4), num_rows * width}):
            yield Bucket(
                phase=Phase.DECODE,
                num_rows=num_rows,
                num_tokens=num_rows,
                num_logits=num_rows,
                max_query=1,
                blocks_per_row=width,
                num_blocks=num_blocks,
            )


def prompt_buckets(batch: BatchPolicy, block_size: int) -> Iterator[Bucket]:
    """One whole prompt by tokens and context; decodes by rows and context."""
    width = -(-batch.max_context // block_size)
    contexts = sizes(max(1, width // 4), width, 4)
    tokens = sizes(min(64, batch.max_tokens), batch.max_tokens, 4)
    phases = ((Phase.PREFILL, [1], tokens), (Phase.DECODE, sizes(1, batch.max_rows, 4), [1]))
    for phase, rows, queries in phases:
        for num_rows, query, context in product(rows, queries, contexts):
            if query <= context * block_size or context == width:
                yield Bucket(
                    phase=phase,
                    num_rows=num_rows,
                    num_tokens=num_rows * query,
                    num_logits=num_rows,
                    max_query=query,
                    blocks_per_row=context,
                )


def token_buckets(batch: BatchPolicy, block_size: int) -> Iterator[Bucket]:
    """One family, over tokens: rows, logits and context are always the most."""
    for tokens in sizes(min(8, batch.max_tokens), batch.max_tokens, 4):
        yield Bucket(
            phase=Phase.MIXED,
            num_rows=batch.max_rows,
            num_tokens=tokens,
            num_logits=batch.max_rows,
            max_query=tokens,
            blocks_per_row=-(-batch.max_context // block_size),
        )
