"""Steps composed by chance, as any scheduler could that obeys a BatchPolicy: their sizes, no tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import TooLarge
from ..plugin import Launch
from ..shapes import BatchShape, Phase


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One row of a step: tokens `[start, start + count)` of a text."""

    start: int
    count: int
    num_logits: int
    is_decode: bool = False

    @property
    def end(self) -> int:
        """Tokens of the text after the step."""
        return self.start + self.count


def shape_of(
    parts: Sequence[Part], block_size: int, *, num_blocks: int = 0, max_block: int = 0
) -> BatchShape:
    """The sizes of a step; blocks are counted where they are not given."""
    kinds = {part.is_decode for part in parts}
    single = Phase.DECODE if kinds == {True} else Phase.PREFILL
    entries = sum(-(-part.end // block_size) for part in parts)
    return BatchShape(
        phase=Phase.MIXED if len(kinds) == 2 else single,
        num_rows=len(parts),
        num_tokens=sum(part.count for part in parts),
        num_logits=sum(part.num_logits for part in parts),
        max_query=max(part.count for part in parts),
        max_context=max(part.end for part in parts),
        max_computed=max(part.start for part in parts),
        num_blocks=num_blocks or entries,
        max_block=max_block or entries,
    )


class Composer:
    """Steps for one launch whose pool has `num_blocks` blocks."""

    def __init__(self, launch: Launch, num_blocks: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.policy = launch.shapes.batch
        self.capabilities = launch.capabilities
        self.block_size = launch.options.block_size
        self.max_context = min(self.policy.max_context, launch.options.max_context)
        self.num_blocks = num_blocks

    def parts(self, *, targets: bool = False) -> list[Part]:
        """Decode rows first. With `targets` a prefill row may have more than one row of logits."""
        kinds, tokens, blocks = self._kinds(), self.policy.max_tokens, self.num_blocks - 1
        is_shared = self.capabilities.prefix_cache and self.random.random() < 0.3
        parts: list[Part] = []
        for index, is_decode in enumerate(kinds):
            spare = len(kinds) - index - 1
            part = self._part(is_decode, tokens - spare, max(1, blocks - spare), targets)
            parts.append(part)
            tokens -= part.count
            # rows that share a prefix hold a block of their own each
            blocks -= 1 if is_shared else -(-part.end // self.block_size)
            if not blocks:
                break
        return parts

    def shape(self, *, targets: bool = False) -> BatchShape:
        """Of a step by chance; where prefixes are shared, rows may have more entries than there are blocks."""
        return self.shape_of(self.parts(targets=targets))

    def shape_of(self, parts: Sequence[Part]) -> BatchShape:
        """`parts`, wherever in the pool their blocks are."""
        exact = shape_of(parts, self.block_size)
        most = self.num_blocks - 1
        highest = self.random.choice((most, self.random.randint(min(exact.num_blocks, most), most)))
        return replace(exact, max_block=highest)

    def smaller(self, parts: Sequence[Part]) -> list[Part]:
        """No more of anything, in the same phase."""
        kept = [part for part in parts if self.random.random() < 0.7]
        kinds = {part.is_decode for part in parts}
        for kind in kinds - {part.is_decode for part in kept}:
            kept.append(next(part for part in parts if part.is_decode is kind))
        return [self._smaller(part) for part in kept]

    def _smaller(self, part: Part) -> Part:
        if part.is_decode:
            return replace(part, start=self._length(1, part.start))
        count = self._length(1, part.count)
        start = self._length(0, part.start) if self.capabilities.chunked_prefill else part.start
        return replace(part, start=start, count=count, num_logits=min(part.num_logits, count))

    def _kinds(self) -> list[bool]:
        """Whether each row decodes."""
        policy = self.policy
        most = min(policy.max_rows, policy.max_tokens)
        count = self.random.choice((1, most, self.random.randint(1, most)))
        decodes = self.random.choice((0, count))
        if policy.mixed and self.random.random() < 0.5:
            decodes = self.random.randint(0, count)
        prefills = count - decodes
        if policy.max_prefills is not None:
            prefills = min(prefills, policy.max_prefills)
        return [True] * decodes + [False] * prefills

    def _part(self, is_decode: bool, tokens: int, blocks: int, targets: bool) -> Part:
        most = min(self.max_context, blocks * self.block_size)
        if is_decode:
            return Part(start=self._length(1, most - 1), count=1, num_logits=1, is_decode=True)
        start = self._start(most - 1)
        count = self._length(1, min(tokens, most - start))
        num_logits = 1
        if targets and self.random.random() < 0.5:
            num_logits = self.random.choice((count, self.random.randint(1, count)))
        elif self.capabilities.chunked_prefill and self.random.random() < 0.4:
            num_logits = 0
        return Part(start=start, count=count, num_logits=num_logits)

    def _start(self, most: int) -> int:
        """What was computed before a prefill row: chunks end anywhere, cached prefixes at the end of a block."""
        if most < 1 or self.random.random() < 0.4:
            return 0
        if self.capabilities.chunked_prefill:
            return self._length(0, most)
        if self.capabilities.prefix_cache:
            return self._length(0, most) // self.block_size * self.block_size
        return 0

    def _length(self, least: int, most: int) -> int:
        """Often at an end of the range, or about the edge of a block."""
        edge = self.random.randint(0, most // self.block_size) * self.block_size
        near = edge + self.random.choice((-1, 0, 1))
        found = self.random.choice((least, most, near, self.random.randint(least, most)))
        return max(least, min(most, found))


def shrink(parts: Sequence[Part], error: TooLarge, *, chunked: bool) -> list[Part]:
    """What the scheduler makes of a step that is TooLarge; never called with a single row of one token."""
    last = parts[-1]
    if chunked and error.axis == "query":
        return [_cut(part, error.limit) for part in parts]
    if chunked and error.axis == "tokens" and not last.is_decode:
        left = error.limit - sum(part.count for part in parts[:-1])
        if 0 < left < last.count:
            return [*parts[:-1], _cut(last, left)]
    return list(parts[:-1])


def _cut(part: Part, count: int) -> Part:
    return part if part.count <= count else replace(part, count=count, num_logits=0)
