"""Rows of texts, and the StepBatch that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..plugin import Launch
from ..shapes import Bucket
from ..step import F32, I32, SamplingBatch, StepBatch, neutral_sampling

Logits = Literal["last", "all", "none"]
"""Which tokens of a row get a row of logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Tokens `[start, start + len(token_ids))` of a text."""

    token_ids: tuple[int, ...]
    start: int = 0
    blocks: tuple[tuple[int, ...], ...] = ((1,),)
    """Per KV group: the ids of the text's blocks, in order."""
    slot: int = 0
    is_decode: bool = False

    @property
    def end(self) -> int:
        """Tokens of the text after the step."""
        return self.start + len(self.token_ids)


def padded(blocks: Sequence[int]) -> I32:
    """Block ids as KVCache's members get them: padded with 0 to a power of two."""
    ids = np.zeros(1 << max(0, (len(blocks) - 1).bit_length()), np.int32)
    ids[: len(blocks)] = blocks
    return ids


def build_batch(
    launch: Launch,
    rows: Sequence[Row],
    bucket: Bucket,
    logits: Logits,
    features: frozenset[str],
    sampling: Mapping[str, I32 | F32],
) -> StepBatch:
    """`rows` padded to `bucket`."""
    options, model, policy = launch.options, launch.model, launch.shapes.batch
    num_slots = options.max_batch_rows
    token_ids = np.zeros(bucket.num_tokens, np.int32)
    positions = np.zeros((1, bucket.num_tokens), np.int32)
    query_len, context_len = (np.zeros(bucket.num_rows, np.int32) for _ in range(2))
    row_slot = np.full(bucket.num_rows, num_slots, np.int32)
    tables = [np.zeros((bucket.num_rows, bucket.blocks_per_row), np.int32) for _ in model.groups]
    at_logits: list[int] = []
    first = 0
    for index, row in enumerate(rows):
        count = len(row.token_ids)
        at = index * bucket.max_query if policy.token_layout == "rows" else first
        token_ids[at : at + count] = row.token_ids
        positions[0, at : at + count] = range(row.start, row.end)
        query_len[index], context_len[index], row_slot[index] = count, row.end, row.slot
        for table, blocks in zip(tables, row.blocks, strict=True):
            used = blocks[: bucket.blocks_per_row]
            table[index, : len(used)] = used
        if logits != "none":
            at_logits += range(at + (0 if logits == "all" else count - 1), at + count)
        first += count
    logit_index = np.zeros(bucket.num_logits, np.int32)
    logit_index[: len(at_logits)] = at_logits
    arrays = neutral_sampling(
        features,
        num_logits=bucket.num_logits,
        num_slots=num_slots,
        vocab_size=model.vocab_size,
        max_logit_bias=options.max_logit_bias,
    )
    for name, array in sampling.items():
        arrays[name][: len(array)] = array
    return StepBatch(
        bucket=bucket,
        num_rows=len(rows),
        num_decode_rows=sum(row.is_decode for row in rows),
        num_tokens=first,
        num_logits=len(at_logits),
        token_ids=token_ids,
        positions=positions,
        query_len=query_len,
        context_len=context_len,
        row_slot=row_slot,
        block_table=tables,
        logit_index=logit_index,
        sampling=SamplingBatch(features=features, **arrays),  # type: ignore[arg-type]
        token_slot=np.full(bucket.num_tokens, -1, np.int32)
        if launch.capabilities.overlapped_steps
        else None,
    )
