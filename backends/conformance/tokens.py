"""Many single tokens through a Session: as many rows of one token each as the backend holds in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import PluginError
from ..step import F32
from .modules import Reader
from .rows import Row
from .session import Session


def decode_rows(
    session: Session, ids: Sequence[int], slots: Sequence[int] | None = None
) -> list[Row]:
    """A row that decodes for each of `ids`, in a slot (default: its place) and a block of its own."""
    groups = len(session.launch.model.groups)
    return [
        Row(token_ids=(token,), start=1, blocks=((index + 1,),) * groups, slot=slot, is_decode=True)
        for index, (token, slot) in enumerate(zip(ids, slots or range(len(ids)), strict=True))
    ]


def num_held(session: Session) -> int:
    """Most decoding rows that a step takes. Raises PluginError where not even one is taken."""
    most = min(session.launch.options.max_batch_rows, session.num_blocks - 1)
    for count in range(most, 0, -1):
        if session.can_hold(decode_rows(session, [0] * count)):
            return count
    raise PluginError("no bucket takes a single decoding row; fit must hold one row within limits")


def pieces(count: int, size: int) -> Iterator[slice]:
    """Of `size` each, the last one perhaps shorter."""
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def read_tokens(session: Session, reader: Reader, ids: Sequence[int]) -> F32:
    """The reader's values [len(ids), n], each token a decoding row."""
    found = [
        session.read(reader, session.batch(decode_rows(session, ids[piece])))
        for piece in pieces(len(ids), num_held(session))
    ]
    return np.concatenate(found)


def read_text(session: Session, reader: Reader, ids: Sequence[int]) -> F32:
    """The reader's values of one row that brings all of `ids` at once.

    [len(ids), n], or only the last token's [1, n] where not every token of a row can have logits.
    """
    size = session.block_size
    blocks = tuple(range(1, -(-len(ids) // size) + 1))
    row = Row(token_ids=tuple(ids), blocks=(blocks,) * len(session.launch.model.groups))
    holds_all = session.can_hold([row], "all")
    return session.read(reader, session.batch([row], logits="all" if holds_all else "last"))
