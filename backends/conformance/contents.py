"""What the blocks of a session's cache hold: put in, copied and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..kv_cache import KVBlob
from .blobs import blocks_of, expect_same, followed_by_zeros, joined
from .rows import padded
from .session import Session


def put_in(session: Session, group: int, blocks: Sequence[int], blob: KVBlob) -> None:
    """`blob` into `blocks`; zeros into the null block where ids are padded."""
    ids = padded(blocks)
    whole = followed_by_zeros(blob, (ids.size - len(blocks)) * session.block_size)
    with torch.inference_mode():
        session.cache = session.backend.kv.import_blocks(session.cache, group, ids, whole)


def copy(session: Session, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Each of `sources` to its target; padding copies the null block onto itself."""
    pairs = np.ascontiguousarray(np.stack((padded(sources), padded(targets)), axis=1))
    with torch.inference_mode():
        session.cache = session.backend.kv.copy_blocks(session.cache, group, pairs)


def everything(session: Session) -> list[KVBlob]:
    """Per KV group, all blocks but the null block."""
    return [_all_blocks(session, group) for group in range(len(session.plans))]


def expect_kept(
    session: Session, before: Sequence[KVBlob], changed: Mapping[int, Sequence[int]]
) -> None:
    """All is as `everything` said `before`, but for the null block and the blocks `changed`, by group."""
    for group, blob in enumerate(before):
        excepted = changed.get(group, ())
        kept = [n for n in range(session.num_blocks - 1) if n + 1 not in excepted]
        found = blocks_of(_all_blocks(session, group), kept, session.block_size)
        wanted = blocks_of(blob, kept, session.block_size)
        expect_same(found, wanted, f"blocks of group {group} that should be as they were")


def _all_blocks(session: Session, group: int) -> KVBlob:
    blocks = range(1, session.num_blocks)
    return joined(
        [session.export(group, blocks[first : first + 64]) for first in range(0, len(blocks), 64)]
    )
