"""How steps may be composed and padded: BatchPolicy, BatchShape, Bucket, ShapePolicy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from .errors import TooLarge


class Phase(StrEnum):
    """What the rows of a step are. MIXED may serve any phase where mixing is allowed."""

    PREFILL = "prefill"
    """No row is a decode row."""
    DECODE = "decode"
    """Every row is one."""
    MIXED = "mixed"
    """Both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPolicy:
    """How a step may be composed. The scheduler obeys before it composes one."""

    mixed: bool = True
    """Prefill and decode rows in one step."""
    max_prefills: int | None = None
    """Prefill rows a step."""
    token_layout: Literal["packed", "rows"] = "packed"
    """rows: T = R * Q, token t of row r at r * Q + t; never mixed."""
    max_rows: int = 256
    """Rows a step; at most ResolvedOptions.max_batch_rows."""
    max_tokens: int = 8192
    """True tokens a step."""
    max_context: int = 2**30
    """Tokens of a row after the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """True sizes of a step, before padding."""

    phase: Phase
    """What its rows are."""
    num_rows: int
    """Requests."""
    num_tokens: int
    """Over all rows."""
    num_logits: int
    """Rows that draw or are scored; 0 where none does."""
    max_query: int
    """Most tokens of a row in this step."""
    max_context: int
    """Longest row after this step."""
    max_computed: int
    """Most tokens of a row before it."""
    num_blocks: int
    """Table entries in use over all rows, of the largest group."""
    max_block: int
    """Highest block id in use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Sizes a step is padded to; equal buckets are one compiled graph. Hashable; static in every graph."""

    phase: Phase
    """That of the shape, or one that serves it."""
    num_rows: int
    """R"""
    num_tokens: int
    """T"""
    num_logits: int
    """L, at least 1"""
    max_query: int
    """Q"""
    blocks_per_row: int
    """M: width of the host tables of every group, at least ceil(max_context / block size)."""
    context_blocks: int = 0
    """Columns that hold tokens of before the step, where a prefill gathers only those."""
    num_blocks: int = 0
    """Where the device packs used blocks instead of rows of them."""


class ShapePolicy(ABC):
    """Pure and small. Only the engine process calls fit, before it composes; the bucket travels with the step."""

    batch: BatchPolicy
    """What the scheduler obeys."""

    @abstractmethod
    def fit(self, shape: BatchShape) -> Bucket:
        """The smallest bucket that holds `shape`; exact sizes where shapes are dynamic. Monotone.

        Raises TooLarge, but never for one row within max_tokens and max_context that has one row of logits, whatever
        was computed before.
        """

    def buckets(self, num_blocks: int) -> Sequence[Bucket]:  # noqa: ARG002
        """Those compiled at warm-up, asked for once the KV size (of the largest group) is known.

        Empty where shapes are dynamic.
        """
        return ()

    def draw_variants(self) -> Sequence[frozenset[str]]:
        """Feature sets that drawing is compiled for. Empty: any set will do.

        The core takes the smallest that holds what the rows need, and neutral values fill the rest. Must include the
        empty set and Capabilities.features.
        """
        return ()

    def largest(self) -> Sequence[BatchShape]:
        """Steps whose memory a "profile" budget must leave free.

        Run with real rows whose tables point to block 1 of a two-block cache that the core allocates before and frees
        after. Drawn with the largest variant.
        """
        return ()


class DynamicShapes(ShapePolicy):
    """Exact sizes: for devices that run any shape without compiling."""

    def __init__(self, batch: BatchPolicy, block_size: int) -> None:
        self.batch = batch
        self.block_size = block_size

    def fit(self, shape: BatchShape) -> Bucket:
        """Exactly `shape`, with at least one row of logits."""
        policy = self.batch
        if shape.num_rows > policy.max_rows:
            raise TooLarge("rows", policy.max_rows)
        if shape.num_tokens > policy.max_tokens:
            raise TooLarge("tokens", policy.max_tokens)
        if shape.max_context > policy.max_context:
            raise TooLarge("context", policy.max_context)
        return Bucket(
            phase=shape.phase,
            num_rows=shape.num_rows,
            num_tokens=shape.num_tokens,
            num_logits=max(1, shape.num_logits),
            max_query=shape.max_query,
            blocks_per_row=-(-shape.max_context // self.block_size),
        )
