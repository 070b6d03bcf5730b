"""How many blocks each KV group gets from a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...backends.options import KVGroup
from .manager import window_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class KVSize:
    """Blocks per group, the null block included, and the tokens of one request that they could hold."""

    num_blocks: tuple[int, ...]
    num_tokens: int
    num_bytes: int


def size_groups(
    groups: Sequence[KVGroup],
    block_bytes: Sequence[int],
    budget: int,
    *,
    block_size: int,
    max_rows: int,
    max_step_tokens: int,
    max_context: int,
) -> KVSize:
    """Blocks for as many tokens as `budget` bytes hold, but no more than `max_rows` full requests need.

    A sliding group never gets more than `max_rows` windows: what lies left of a window is given back.
    """

    def blocks(num_tokens: int) -> list[int]:
        wanted = -(-num_tokens // block_size)
        caps = [
            wanted
            if group.window is None
            else min(wanted, max_rows * window_blocks(group.window, max_step_tokens, block_size))
            for group in groups
        ]
        return [cap + 1 for cap in caps]

    def size(num_tokens: int) -> int:
        return sum(n * b for n, b in zip(blocks(num_tokens), block_bytes, strict=True))

    low, high = 0, max_rows * -(-max_context // block_size)
    while low < high:
        middle = (low + high + 1) // 2
        if size(middle * block_size) <= budget:
            low = middle
        else:
            high = middle - 1
    tokens = low * block_size
    return KVSize(num_blocks=tuple(blocks(tokens)), num_tokens=tokens, num_bytes=size(tokens))
