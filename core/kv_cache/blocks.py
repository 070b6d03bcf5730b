"""BlockPool: which blocks of one KV group are held, which only remember, which are blank."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference counts and content keys of the blocks 1 .. num_blocks - 1 of a KV group (0 is null).

    A block is in exactly one of three states:

        held       count > 0; it may have a key
        cached     count = 0, with a key: its content can be found until it is evicted, oldest first
        blank      count = 0, without a key; handed out lowest id first
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._counts = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._blank = list(range(1, num_blocks))

    @property
    def num_total(self) -> int:
        """Blocks that requests can hold."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds: blank or cached."""
        return len(self._blank) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks that somebody holds."""
        return self.num_total - self.num_free

    def find(self, key: bytes) -> int | None:
        """The block with that content, held or cached."""
        return self._by_key.get(key)

    def take(self, count: int) -> list[int]:
        """Hold `count` blocks of no content: blank ones first, then the longest unused cached ones."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        taken = []
        for _ in range(count):
            if self._blank:
                block = heapq.heappop(self._blank)
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._counts[block] = 1
            taken.append(block)
        return taken

    def acquire(self, blocks: Iterable[int]) -> None:
        """Hold blocks that find() gave."""
        for block in blocks:
            if self._counts[block] == 0:
                del self._cached[block]
            self._counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give blocks up; those nobody holds any more are cached if they have a key, else blank."""
        for block in blocks:
            assert self._counts[block] > 0, f"block {block} is not held"
            self._counts[block] -= 1
            if self._counts[block] == 0:
                if self._keys[block] is None:
                    heapq.heappush(self._blank, block)
                else:
                    self._cached[block] = None

    def remember(self, block: int, key: bytes) -> None:
        """Say what a held block contains; a content that another block already has is not recorded twice."""
        assert self._counts[block] > 0, f"block {block} is not held"
        if self._keys[block] is None and key not in self._by_key:
            self._keys[block] = key
            self._by_key[key] = block

    def forget(self, blocks: Iterable[int]) -> None:
        """Drop what is known of held blocks, so that nobody finds them again."""
        for block in blocks:
            if self._keys[block] is not None:
                self._forget(block)

    def clear(self) -> None:
        """Make cached blocks blank; none may be held."""
        assert self.num_held == 0, f"{self.num_held} blocks are held"
        for block in self._cached:
            self._forget(block)
            heapq.heappush(self._blank, block)
        self._cached.clear()

    def check(self, held: Sequence[int]) -> None:
        """Assert every invariant; `held` lists every hold of every request (a block as often as it is held)."""
        counts = [0] * self.num_blocks
        for block in held:
            counts[block] += 1
        assert counts == self._counts, "counts differ from what the requests hold"
        assert counts[0] == 0, "the null block is held"
        blank, cached = set(self._blank), set(self._cached)
        assert len(blank) == len(self._blank), "a block is blank twice"
        free = {b for b in range(1, self.num_blocks) if counts[b] == 0}
        assert blank | cached == free, "free blocks are neither blank nor cached"
        assert not blank & cached, "a block is both blank and cached"
        assert all(self._keys[b] is None for b in blank), "a blank block has a key"
        assert all(self._keys[b] is not None for b in cached), "a cached block has no key"
        keyed = {b: k for b, k in enumerate(self._keys) if k is not None}
        assert {k: b for b, k in keyed.items()} == self._by_key, "keys and blocks disagree"

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        del self._by_key[key]
        self._keys[block] = None
