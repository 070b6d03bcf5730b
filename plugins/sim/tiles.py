"""Rows cut into tiles of equally many queries, so that a long prompt does not pad the rows beside it."""

from __future__ import annotations

import numpy as np

from ...backends.shapes import Bucket
from ...backends.step import F32, I32, StepBatch, row_first, slot_mapping

WIDEST = 16
"""Queries of a tile at most: a row with fewer pays for as many."""


def tile_shape(bucket: Bucket) -> tuple[int, int]:
    """How many tiles its tokens and rows can make at most, and their width: narrow where the step is small."""
    width = min(WIDEST, bucket.max_query, max(1, bucket.num_tokens // WIDEST))
    return min(bucket.num_tokens, bucket.num_tokens // width + bucket.num_rows), width


def tiled_arrays(batch: StepBatch, block_size: int) -> dict[str, I32 | F32]:
    """What ReferenceAttention reads in the packed layout, each tile as a row of its own.

    As many tiles as the bucket could need, so that shapes depend on it alone.
    """
    bucket = batch.bucket
    count, width = tile_shape(bucket)
    per_row = -(-batch.query_len // width)
    row = np.repeat(np.arange(bucket.num_rows), per_row)
    first = (np.arange(row.size) - np.repeat(np.cumsum(per_row) - per_row, per_row)) * width
    query = first[:, None] + np.arange(width)
    real = query < batch.query_len[row, None]

    gather = np.zeros((count, width), np.int32)
    query_index = np.zeros((count, width), np.int32)
    context_len = np.zeros(count, np.int32)
    used = slice(0, row.size)
    gather[used] = np.where(real, row_first(batch, "packed")[row, None] + query, 0)
    query_index[used] = (batch.context_len - batch.query_len)[row, None] + query
    context_len[used] = batch.context_len[row]
    back = np.zeros(bucket.num_tokens, np.int32)
    places = np.arange(count * width, dtype=np.int32).reshape(count, width)
    back[gather[used][real]] = places[used][real]
    arrays: dict[str, I32 | F32] = {
        "gather": gather,
        "back": back,
        "query_index": query_index,
        "context_len": context_len,
    }
    for group, table in enumerate(batch.block_table):
        tiled = np.zeros((count, table.shape[1]), np.int32)
        tiled[used] = table[row]
        arrays[f"table{group}"] = tiled
        slots = slot_mapping(batch, group, block_size, "packed")
        arrays[f"slots{group}"] = np.maximum(slots, 0)
    return arrays
