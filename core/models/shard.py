"""Which part of each axis a rank holds. No torch here.

All ranks have parts of one size; where an axis does not divide, the last parts are filled up with zeros. Heads are cut
by groups, a key-value head and the query heads that share it:

    9 heads, 3 for KV, 2 ranks    q 0 1 2 | 3 4 5    q 6 7 8 | . . .     KV heads 0 1 and 2 .
    9 heads, 3 for KV, 8 ranks    q 0 1, q 2 ., q 3 4, q 5 ., …    two ranks share a KV head, the last have none
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_ALIGNMENTS: Final = (128, 64, 32, 16, 8)
"""Parts are multiples of the first that costs little: kernels, and groups and blocks of packed weights, like it."""
_MAX_PADDING: Final = 1 / 32
"""Of the whole axis."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Entries start to stop of an axis, then zeros up to `size`."""

    start: int
    stop: int
    size: int

    @property
    def num_held(self) -> int:
        """Entries that are no padding."""
        return self.stop - self.start

    def times(self, factor: int) -> Span:
        """The same part where each entry stands for `factor` of them."""
        return Span(start=self.start * factor, stop=self.stop * factor, size=self.size * factor)


def whole(size: int) -> Span:
    """All of an axis."""
    return Span(start=0, stop=size, size=size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One of `size` ranks that share every layer."""

    rank: int = 0
    size: int = 1

    def even(self, total: int) -> Span:
        """Of an axis that may be cut anywhere: an MLP's inner one, the rows of the vocabulary."""
        if self.size == 1:
            return whole(total)
        part = -(-total // self.size)
        for alignment in _ALIGNMENTS:
            aligned = -(-part // alignment) * alignment
            if aligned * self.size <= total * (1 + _MAX_PADDING):
                return self._nth(self.rank, aligned, total)
        return self._nth(self.rank, part, total)

    def kv_heads(self, num_kv_heads: int) -> Span:
        """Whole heads; where there are more ranks than heads, some ranks hold the same one."""
        copies = self._copies(num_kv_heads)
        if copies:
            return self._nth(self.rank // copies, 1, num_kv_heads)
        return self._nth(self.rank, -(-num_kv_heads // self.size), num_kv_heads)

    def heads(self, num_heads: int, num_kv_heads: int) -> Span:
        """Those that share the heads of `kv_heads`, or the rank's part of them where other ranks hold the same one."""
        group = num_heads // num_kv_heads
        copies = self._copies(num_kv_heads)
        if not copies:
            return self.kv_heads(num_kv_heads).times(group)
        kv = self.kv_heads(num_kv_heads)
        within = self._nth(self.rank % copies, -(-group // copies), kv.num_held * group)
        first = kv.start * group
        return Span(start=first + within.start, stop=first + within.stop, size=within.size)

    def _copies(self, num_kv_heads: int) -> int:
        """How many ranks hold one KV head; 0: each rank has heads of its own."""
        return self.size // num_kv_heads if self.size > num_kv_heads else 0

    def _nth(self, index: int, part: int, total: int) -> Span:
        start = min(index * part, total)
        return Span(start=start, stop=min(start + part, total), size=part)


WHOLE: Final = Shard()
