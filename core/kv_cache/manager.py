"""KVCacheManager: the blocks of every running request, over all KV groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ...backends.options import KVGroup
from .blocks import BlockPool
from .prefix import extend_keys


@dataclass(eq=False, slots=True)
class BlockTable:
    """The blocks of one request; only the manager changes it.

    group 0 (full)       12  7 31  4
    group 1 (sliding)     0  0  9 22      0 where the block left the window
    """

    salt: str
    blocks: list[list[int]]
    """Per KV group, one id a block of tokens."""
    keys: list[bytes] = field(default_factory=list)
    """Content keys of the full blocks known so far."""
    num_remembered: int = 0
    """Leading blocks whose content the pools know."""
    num_trimmed: list[int] = field(default_factory=list)
    """Per KV group, leading entries that were given back."""
    num_cached_tokens: int = 0
    """Tokens that the prefix cache brought."""


class KVCacheManager:
    """Reserves, trims, remembers and releases. Pure data: it never touches a device."""

    def __init__(
        self,
        groups: Sequence[KVGroup],
        num_blocks: Sequence[int],
        *,
        block_size: int,
        max_step_tokens: int,
        prefix_cache: bool = True,
    ) -> None:
        self.groups = tuple(groups)
        self.pools = tuple(BlockPool(n) for n in num_blocks)
        self.block_size = block_size
        self.max_step_tokens = max_step_tokens
        self.prefix_cache = prefix_cache
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    @property
    def largest(self) -> BlockPool:
        """The pool with most blocks."""
        return max(self.pools, key=lambda pool: pool.num_blocks)

    @property
    def num_held(self) -> int:
        """Blocks held, over all groups."""
        return sum(pool.num_held for pool in self.pools)

    @property
    def num_free(self) -> int:
        """Blocks not held, over all groups."""
        return sum(pool.num_free for pool in self.pools)

    def fits(self, num_tokens: int) -> bool:
        """Whether an empty cache could hold a request of that many tokens to its end."""
        return all(
            self._most_blocks(group, num_tokens) <= pool.num_total
            for group, pool in zip(self.groups, self.pools, strict=True)
        )

    def open(self, tokens: Sequence[int], salt: str = "") -> BlockTable:
        """A table that holds what the cache already has of `tokens`, but for the last one (it must be computed)."""
        table = BlockTable(
            salt=salt, blocks=[[] for _ in self.groups], num_trimmed=[0] * len(self.groups)
        )
        if not self.prefix_cache:
            return table
        extend_keys(table.keys, tokens, self.block_size, salt)
        count = self._match(table.keys[: (len(tokens) - 1) // self.block_size])
        for index, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            first = self._first_visible(group, count * self.block_size)
            found = [pool.find(key) for key in table.keys[first:count]]
            blocks = [block for block in found if block is not None]
            assert len(blocks) == count - first
            pool.acquire(blocks)
            table.blocks[index] = [0] * first + blocks
            table.num_trimmed[index] = first
        table.num_remembered = count
        table.num_cached_tokens = count * self.block_size
        return table

    def count_lookup(self, table: BlockTable, num_tokens: int) -> None:
        """Record for the metrics that a request of `num_tokens` was admitted with `table`."""
        self.num_queried_tokens += num_tokens
        self.num_hit_tokens += table.num_cached_tokens

    def can_reserve(self, table: BlockTable, num_tokens: int) -> bool:
        """Whether reserve() would succeed."""
        return all(
            need <= pool.num_free
            for need, pool in zip(self._lacking(table, num_tokens), self.pools, strict=True)
        )

    def reserve(self, table: BlockTable, num_tokens: int) -> bool:
        """Hold blocks for `num_tokens` tokens of the request; all or nothing."""
        if not self.can_reserve(table, num_tokens):
            return False
        lacking = self._lacking(table, num_tokens)
        for blocks, need, pool in zip(table.blocks, lacking, self.pools, strict=True):
            blocks.extend(pool.take(need))
        return True

    def trim(self, table: BlockTable, num_computed: int) -> None:
        """Give back the blocks that no token from `num_computed` on can see."""
        for index, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            blocks, start = table.blocks[index], table.num_trimmed[index]
            end = min(self._first_visible(group, num_computed), len(blocks))
            if end > start:
                pool.release(block for block in blocks[start:end] if block)
                blocks[start:end] = [0] * (end - start)
                table.num_trimmed[index] = end

    def remember(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> None:
        """Let other requests find the blocks that the first `num_computed` of `tokens` have filled."""
        full = num_computed // self.block_size
        if not self.prefix_cache or full <= table.num_remembered:
            return
        extend_keys(table.keys, tokens[: full * self.block_size], self.block_size, table.salt)
        for blocks, pool in zip(table.blocks, self.pools, strict=True):
            for index in range(table.num_remembered, full):
                if blocks[index]:
                    pool.remember(blocks[index], table.keys[index])
        table.num_remembered = full

    def discard(self, table: BlockTable) -> None:
        """Let nobody find the blocks that this request filled: what it computed may be garbage."""
        first = table.num_cached_tokens // self.block_size
        for blocks, pool in zip(table.blocks, self.pools, strict=True):
            pool.forget(block for block in blocks[first:] if block)

    def forget_all(self) -> None:
        """The device has lost every block: nobody finds any. No table may be open."""
        for pool in self.pools:
            pool.clear()

    def close(self, table: BlockTable) -> None:
        """Give every block back; the tail first, so that it is evicted before what it hangs on."""
        for blocks, pool in zip(table.blocks, self.pools, strict=True):
            pool.release(block for block in reversed(blocks) if block)
            blocks.clear()

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert every invariant, given all open tables."""
        tables = list(tables)
        for index, pool in enumerate(self.pools):
            pool.check([block for table in tables for block in table.blocks[index] if block])

    def _first_visible(self, group: KVGroup, num_computed: int) -> int:
        """Index of the first block that a token at `num_computed` sees."""
        if group.window is None:
            return 0
        return max(0, num_computed - group.window + 1) // self.block_size

    def _most_blocks(self, group: KVGroup, num_tokens: int) -> int:
        """Blocks that a request of `num_tokens` holds at its peak."""
        blocks = -(-num_tokens // self.block_size)
        if group.window is None:
            return blocks
        return min(blocks, window_blocks(group.window, self.max_step_tokens, self.block_size))

    def _lacking(self, table: BlockTable, num_tokens: int) -> list[int]:
        wanted = -(-num_tokens // self.block_size)
        return [max(0, wanted - len(blocks)) for blocks in table.blocks]

    def _match(self, keys: Sequence[bytes]) -> int:
        """The most leading blocks such that every group has those that the next token sees."""
        count = len(keys)
        runs = []
        for group, pool in zip(self.groups, self.pools, strict=True):
            run, length = [0], 0
            for key in keys[:count]:
                length = length + 1 if pool.find(key) is not None else 0
                if length == 0 and group.window is None:
                    break
                run.append(length)
            count = min(count, len(run) - 1)
            runs.append(run)
        while count and not all(
            run[count] >= count - self._first_visible(group, count * self.block_size)
            for group, run in zip(self.groups, runs, strict=True)
        ):
            count -= 1
        return count


def window_blocks(window: int, max_step_tokens: int, block_size: int) -> int:
    """Blocks that a row of a sliding group holds at most: its window, a step's tokens, and one for the straddle."""
    return -(-(window - 1 + max_step_tokens) // block_size) + 1
