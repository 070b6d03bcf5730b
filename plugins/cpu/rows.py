"""Which rows of a step are attended to together, and where their keys lie in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...backends.step import I32, StepBatch, row_first, slot_mapping

MAX_GATHERED = 16384
"""Tokens, padding included, that rows of one query each gather at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """R rows of Q queries each, over S keys: many rows of one query, or one row of many."""

    tokens: slice | Tensor
    """Where in T the R * Q queries are."""
    slots: Tensor
    """[R * S] i64 token slots of the keys in the cache; padding repeats the row's last, which is finite."""
    query_index: Tensor
    """[R, Q] i64 index in the row's text"""
    key_index: Tensor
    """[R, S] i64 index in the row's text; on padding past every query, so that it is masked as the future is."""
    bias: Tensor | None
    """[R, 1, Q, S] f32 to add to the scores; None where every query sees every key, or `causal` says it all."""
    causal: bool
    """Query i sees the first i + 1 keys."""


class AttentionInputs:
    """What CPUAttention reads of a step; worked out when the first layer asks, and kept for the others."""

    def __init__(self, batch: StepBatch, block_size: int) -> None:
        self._batch = batch
        self._block_size = block_size
        self._targets: dict[int, Tensor] = {}
        self._parts: dict[tuple[int, int | None], list[Part]] = {}

    def targets(self, group: int) -> Tensor:
        """[true tokens] i64 token slots that the step's keys go to."""
        if group not in self._targets:
            at = slot_mapping(self._batch, group, self._block_size, "packed")
            self._targets[group] = torch.from_numpy(at[: self._batch.num_tokens].astype(np.int64))
        return self._targets[group]

    def parts(self, group: int, window: int | None) -> Sequence[Part]:
        """All rows that bring tokens."""
        key = (group, window)
        if key not in self._parts:
            cutter = _Cutter(self._batch, group, window, self._block_size)
            self._parts[key] = list(cutter.parts())
        return self._parts[key]


class _Cutter:
    """Cuts a step into parts, for layers of one KV group and window."""

    def __init__(self, batch: StepBatch, group: int, window: int | None, block_size: int) -> None:
        self.table = batch.block_table[group]
        self.block_size = block_size
        self.window = window
        self.first = row_first(batch, "packed")
        self.query_len = batch.query_len
        self.computed = batch.context_len - batch.query_len
        # nothing left of the window of the row's first query: its blocks may be gone
        self.start = np.maximum(0, self.computed + 1 - window) if window else 0 * self.computed
        self.num_keys = batch.context_len - self.start

    def parts(self) -> Iterator[Part]:
        singles = np.flatnonzero(self.query_len == 1)
        for rows in split_evenly(singles, self.num_keys[singles], MAX_GATHERED):
            yield self._part(rows)
        for row in np.flatnonzero(self.query_len > 1):
            yield self._part(np.array([row]))

    def _part(self, rows: NDArray[np.intp]) -> Part:
        num_queries, num_keys = int(self.query_len[rows[0]]), self.num_keys[rows]
        offset = np.arange(num_keys.max())
        key_index = self.start[rows, None] + offset
        real = np.minimum(key_index, self.start[rows, None] + num_keys[:, None] - 1)
        block = np.take_along_axis(self.table[rows], real // self.block_size, 1)
        query_index = self.computed[rows, None] + np.arange(num_queries)
        whole = int(num_keys[0]) == num_queries and not self._is_cut(num_queries)
        causal = num_queries > 1 and whole
        return Part(
            tokens=self._tokens(rows, num_queries),
            slots=_i64(block * self.block_size + real % self.block_size).reshape(-1),
            query_index=_i64(query_index),
            key_index=_i64(key_index),
            bias=None if causal else self._bias(query_index, key_index),
            causal=causal,
        )

    def _is_cut(self, num_keys: int) -> bool:
        return self.window is not None and self.window < num_keys

    def _tokens(self, rows: NDArray[np.intp], num_queries: int) -> slice | Tensor:
        first = self.first[rows]
        if (np.diff(first) == num_queries).all():
            return slice(int(first[0]), int(first[0]) + len(rows) * num_queries)
        return _i64(first)

    def _bias(self, query_index: NDArray[np.int64], key_index: NDArray[np.int64]) -> Tensor | None:
        seen = visible(torch.from_numpy(query_index), torch.from_numpy(key_index), self.window)
        if bool(seen.all()):
            return None
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]


def visible(query_index: Tensor, key_index: Tensor, window: int | None) -> Tensor:
    """[R, Q], [R, S] -> [R, Q, S] bool: neither in the future nor left of the window."""
    query, key = query_index[:, :, None], key_index[:, None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def split_evenly(rows: NDArray[np.intp], num_keys: I32, most: int) -> Iterator[NDArray[np.intp]]:
    """Few sets of rows, none of which is more than half padding or, with several rows, above `most` keys."""
    order = np.argsort(-num_keys, kind="stable")
    begin = 0
    for end in range(1, len(order) + 1):
        longest = num_keys[order[begin]]
        full = end == len(order) or (
            2 * num_keys[order[end]] < longest or (end + 1 - begin) * longest > most
        )
        if full:
            yield np.sort(rows[order[begin:end]])
            begin = end


def _i64(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
