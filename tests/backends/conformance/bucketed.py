"""Finite shapes for the reference plugin: a few buckets, and a compiler that only counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from chipset.backends.errors import TooLarge, UnexpectedCompile
from chipset.backends.reference.compiler import EagerCompiler
from chipset.backends.reference.staging import Staged, unpack
from chipset.backends.shapes import BatchPolicy, BatchShape, Bucket, Phase, ShapePolicy

LEAST_TOKENS = 16
LEAST_BLOCKS = 4


def sizes(least: int, most: int) -> list[int]:
    """`least` doubled until `most`, which ends the list."""
    found = [min(least, most)]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return found


def at_least(choices: Sequence[int], wanted: int) -> int:
    """The first of ascending `choices` that is enough; the last where none is."""
    return next((choice for choice in choices if choice >= wanted), choices[-1])


class BucketedShapes(ShapePolicy):
    """Decode steps by rows and blocks, all others by tokens and blocks."""

    def __init__(
        self, batch: BatchPolicy, block_size: int, features: frozenset[str], *, max_context: int
    ) -> None:
        self.batch = batch
        self.features = features
        self.block_size = block_size
        self.rows = sizes(1, batch.max_rows)
        self.tokens = sizes(LEAST_TOKENS, batch.max_tokens)
        self.blocks = sizes(LEAST_BLOCKS, -(-max_context // block_size))

    def fit(self, shape: BatchShape) -> Bucket:
        """See ShapePolicy.fit."""
        policy = self.batch
        if shape.num_rows > policy.max_rows:
            raise TooLarge("rows", policy.max_rows)
        if shape.num_tokens > policy.max_tokens:
            raise TooLarge("tokens", policy.max_tokens)
        if shape.max_context > policy.max_context:
            raise TooLarge("context", policy.max_context)
        num_blocks = at_least(self.blocks, -(-shape.max_context // self.block_size))
        if shape.phase is Phase.DECODE and shape.max_query == 1:
            return self.decode(at_least(self.rows, shape.num_rows), num_blocks)
        num_tokens = at_least(self.tokens, shape.num_tokens)
        return self.mixed(num_tokens, num_blocks, all_logits=shape.num_logits > policy.max_rows)

    def decode(self, num_rows: int, blocks_per_row: int) -> Bucket:
        """One token a row."""
        return Bucket(
            phase=Phase.DECODE,
            num_rows=num_rows,
            num_tokens=num_rows,
            num_logits=num_rows,
            max_query=1,
            blocks_per_row=blocks_per_row,
        )

    def mixed(self, num_tokens: int, blocks_per_row: int, *, all_logits: bool) -> Bucket:
        """Rows of any kind."""
        return Bucket(
            phase=Phase.MIXED,
            num_rows=self.batch.max_rows,
            num_tokens=num_tokens,
            num_logits=max(num_tokens, self.batch.max_rows) if all_logits else self.batch.max_rows,
            max_query=num_tokens,
            blocks_per_row=blocks_per_row,
        )

    def buckets(self, num_blocks: int) -> Sequence[Bucket]:
        """See ShapePolicy.buckets."""
        decode = [self.decode(rows, blocks) for rows in self.rows for blocks in self.blocks]
        mixed = [
            self.mixed(tokens, blocks, all_logits=all_logits)
            for tokens in self.tokens
            for blocks in self.blocks
            for all_logits in (False, True)
        ]
        return list(dict.fromkeys((*decode, *mixed)))

    def draw_variants(self) -> Sequence[frozenset[str]]:
        """Nothing, all, and what most requests want."""
        return (frozenset(), frozenset({"sampled"}), self.features)

    def largest(self) -> Sequence[BatchShape]:
        """As many tokens as a step may have, in one row."""
        tokens = min(self.batch.max_tokens, self.batch.max_context)
        return [
            BatchShape(
                phase=Phase.PREFILL,
                num_rows=1,
                num_tokens=tokens,
                num_logits=1,
                max_query=tokens,
                max_context=tokens,
                max_computed=0,
                num_blocks=-(-tokens // self.block_size),
                max_block=1,
            )
        ]


class CountingCompiler(EagerCompiler):
    """Compiles nothing, but knows what a compiler would have made."""

    def __init__(self) -> None:
        super().__init__(unpack)
        self.is_frozen = False

    def key(self, name: str, staged: Staged) -> tuple[object, ...]:
        """What a graph of `name` depends on."""
        match name:
            case "model":
                return (staged.bucket,)
            case "draw":
                return (staged.bucket.num_logits, staged.features)
        return (staged.bucket, staged.features)

    def wrap(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """See Compiler.wrap."""
        run = super().wrap(name, module)
        made: set[tuple[object, ...]] = set()

        def checked(staged: Staged, *rest: Any) -> Any:
            key = self.key(name, staged)
            if self.is_frozen and key not in made:
                raise UnexpectedCompile(f"{name} was not compiled for {key}")
            made.add(key)
            return run(staged, *rest)

        return checked

    @contextmanager
    def freeze(self) -> Iterator[None]:
        """See Compiler.freeze."""
        self.is_frozen = True
        try:
            yield
        finally:
            self.is_frozen = False
