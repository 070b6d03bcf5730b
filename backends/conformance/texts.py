"""Texts that share a session's cache and are fed to it as a scheduler would feed them, each value checked."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .layers import Layers
from .rows import Logits, Row
from .session import Session
from .tolerance import excess


@dataclass(eq=False, slots=True)
class Text:
    """Tokens known beforehand, of which the first `computed` are in the cache."""

    ids: list[int]
    slot: int
    blocks: list[list[int]]
    """Per KV group; 0 where a block left the window and was given back."""
    computed: int = 0


class Blocks:
    """The blocks of one KV group: those given back last are taken first, as they are."""

    def __init__(self, num_blocks: int, random_: random.Random) -> None:
        self.free = list(range(1, num_blocks))
        random_.shuffle(self.free)
        self.owners: dict[int, int] = {}

    def take(self) -> int:
        """A block that nobody owns."""
        block = self.free.pop()
        self.owners[block] = 1
        return block

    def share(self, block: int) -> int:
        """One owner more."""
        self.owners[block] += 1
        return block

    def give_back(self, block: int) -> None:
        """One owner less."""
        self.owners[block] -= 1
        if not self.owners[block]:
            self.free.append(block)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a text is to bring."""

    text: Text
    count: int
    is_decode: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What a text brings to one step."""

    text: Text
    row: Row


class Texts:
    """Obeys the session's BatchPolicy and capabilities; what they forbid in one step becomes several."""

    def __init__(
        self, session: Session, *, seed: int = 0, poison: bool = False, layers: Layers | None = None
    ) -> None:
        self.session = session
        self.random = random.Random(seed)
        self.layers = layers or Layers(session, seed=seed)
        self.poison = poison
        """Whether blocks that are given back are filled with nan."""
        self.groups = session.launch.model.groups
        self.blocks = [Blocks(session.num_blocks, self.random) for _ in self.groups]
        self.slots = list(range(session.launch.options.max_batch_rows))

    def add(self, length: int, *, prefix: Text | None = None, shared: int = 0) -> Text:
        """A text of random tokens that takes a slot; its first `shared` blocks are those of `prefix`."""
        block_size = self.session.block_size
        vocabulary = range(self.session.launch.model.vocab_size)
        ids = self.random.choices(vocabulary, k=length)
        slot = self.slots.pop(self.random.randrange(len(self.slots)))
        text = Text(ids=ids, slot=slot, blocks=[[] for _ in self.groups])
        if prefix is not None:
            ids[: shared * block_size] = prefix.ids[: shared * block_size]
            text.computed = shared * block_size
            for mine, theirs, pool in zip(text.blocks, prefix.blocks, self.blocks, strict=True):
                mine += [pool.share(block) if block else 0 for block in theirs[:shared]]
                assert all(mine), "a window left what is to be shared"
        return text

    def leave(self, text: Text) -> None:
        """Give back what it holds."""
        self.slots.append(text.slot)
        for group, held in enumerate(text.blocks):
            self._give_back(group, [block for block in held if block])

    def prefill(self, *texts: Text, until: int | None = None) -> None:
        """Compute each text up to `until` (default: but for its last token) in as few steps as may be."""
        last = {t: len(t.ids) - 1 if until is None else until for t in texts}
        self.step({text: last[text] - text.computed for text in texts})

    def decode(self, *texts: Text) -> None:
        """One token of each text, as one that was drawn."""
        self.step(dict.fromkeys(texts, 1), is_decode=True)

    def step(self, counts: Mapping[Text, int], *, is_decode: bool = False) -> None:
        """So many tokens of each text, and compare what comes back."""
        self.mixed(
            [Part(text=text, count=count, is_decode=is_decode) for text, count in counts.items()]
        )

    def mixed(self, parts: Sequence[Part]) -> None:
        """Rows of both kinds."""
        for pieces in self._steps(parts):
            self.take(pieces)

    def take(self, pieces: Sequence[Piece]) -> None:
        """One step, and what comes back is compared."""
        rows = [piece.row for piece in pieces]
        logits: Logits = "all" if self.session.can_hold(rows, "all") else "last"
        batch = self.session.batch(rows, logits=logits)
        found = self.session.read(self.layers.reader, batch)
        first = 0
        for piece in pieces:
            count = len(piece.row.token_ids) if logits == "all" else 1
            self.check(piece.text, found[first : first + count], piece.row.end)
            first += count

    def check(self, text: Text, found: np.ndarray, end: int) -> None:
        """`found` [n, Hq * Dv] are the values of the last n of the first `end` tokens."""
        wanted = self.layers.expected(text.ids[:end], end - len(found))
        off = excess(found, wanted, self.tolerance)
        assert off <= 1, (
            f"tokens {end - len(found)} to {end} of {len(text.ids)} of the text in slot {text.slot} are "
            f"{off:.3g} times as far from the oracle as {self.tolerance} allows"
        )

    @property
    def tolerance(self) -> str:
        """The coarsest dtype in use, whose tolerance holds; float8 is held exactly as the oracle has it."""
        used = {self.session.launch.options.dtype, *(group.dtype for group in self.groups)}
        return next(name for name in ("bfloat16", "float16", "int8", "float32") if name in used)

    def _steps(self, parts: Sequence[Part]) -> Iterator[list[Piece]]:
        """`parts` in as few steps as the policy allows; decode rows first."""
        most = self.session.launch.shapes.batch.max_tokens
        current: list[Piece] = []
        for part in sorted(parts, key=lambda part: not part.is_decode):
            end = part.text.computed + part.count
            while part.text.computed < end:
                if any(piece.text is part.text for piece in current):
                    yield current
                    current = []
                # without chunked prefill max_tokens holds any text
                count = min(end - part.text.computed, most)
                piece = self.piece(part.text, count, is_decode=part.is_decode)
                if current and not self.session.can_hold([p.row for p in (*current, piece)]):
                    yield current
                    current = []
                current.append(piece)
        if current:
            yield current

    def piece(self, text: Text, count: int, *, is_decode: bool = False) -> Piece:
        """The next tokens of a text, for a step that the caller takes."""
        start, end = text.computed, text.computed + count
        self._reserve(text, start, end)
        text.computed = end
        row = Row(
            token_ids=tuple(text.ids[start:end]),
            start=start,
            blocks=tuple(tuple(held) for held in text.blocks),
            slot=text.slot,
            is_decode=is_decode,
        )
        return Piece(text=text, row=row)

    def _reserve(self, text: Text, start: int, end: int) -> None:
        """Give back what left the window, then take blocks for the tokens up to `end`."""
        size = self.session.block_size
        for group, (spec, held) in enumerate(zip(self.groups, text.blocks, strict=True)):
            if spec.window is not None:
                gone = max(0, start - spec.window + 1) // size
                self._give_back(group, [block for block in held[:gone] if block])
                held[:gone] = [0] * len(held[:gone])
            while len(held) * size < end:
                held.append(self.blocks[group].take())

    def _give_back(self, group: int, blocks: Sequence[int]) -> None:
        pool = self.blocks[group]
        for block in blocks:
            pool.give_back(block)
        gone = [block for block in blocks if block not in pool.owners or not pool.owners[block]]
        if self.poison and gone:
            self.session.overwrite(group, gone, float("nan"))


class Schedule:
    """A scheduler's work, by chance."""

    def __init__(self, texts: Texts, *, longest: int = 90) -> None:
        self.texts, self.random, self.longest = texts, texts.random, longest
        self.chunked = texts.session.launch.capabilities.chunked_prefill
        self.running: list[Text] = []

    def run(self, num_steps: int) -> None:
        """So many times."""
        for _ in range(num_steps):
            self._admit()
            self.texts.mixed([self._part(text) for text in self.running])
            for text in [text for text in self.running if text.computed == len(text.ids)]:
                self.running.remove(text)
                self.texts.leave(text)

    def _admit(self) -> None:
        size = self.texts.session.block_size
        least = min(len(pool.free) for pool in self.texts.blocks)
        free = least - sum(-(-len(text.ids) // size) for text in self.running)
        while self.texts.slots and self.random.random() < 0.6:
            length = self.random.randint(2, self.longest)
            free -= -(-length // size)
            if free < 0:
                return
            self.running.append(self.texts.add(length))

    def _part(self, text: Text) -> Part:
        left = len(text.ids) - text.computed
        prompt = 2 * len(text.ids) // 3
        if text.computed >= max(1, prompt):
            return Part(text=text, count=1, is_decode=True)
        if not self.chunked:
            return Part(text=text, count=max(1, prompt) - text.computed)
        return Part(text=text, count=min(left, self.random.randint(1, 40)))
