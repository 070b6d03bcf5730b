"""Blocks of a session's cache on the host: made, put in, copied and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kv_cache import KVBlob
from ..reference.dtypes import torch_dtype
from .rows import padded
from .session import Session


def random_blob(session: Session, group: int, num_blocks: int, seed: int) -> KVBlob:
    """Of so many blocks, no number of which is likely to be anywhere else."""
    held = session.launch.model.groups[group]
    generator = torch.Generator().manual_seed(seed)
    size = (len(held.layers), num_blocks * session.block_size, held.num_kv_heads)
    dtype = torch_dtype(held.dtype)
    return KVBlob(
        keys=torch.randn(*size, held.head_size, generator=generator).to(dtype),
        values=torch.randn(*size, held.value_size, generator=generator).to(dtype),
        heads=(0, held.num_kv_heads),
    )


def put_in(session: Session, group: int, blocks: Sequence[int], blob: KVBlob) -> None:
    """`blob` into `blocks`; zeros into the null block where ids are padded."""
    ids = padded(blocks)
    more = (ids.size - len(blocks)) * session.block_size
    keys, values = (pad(x, (0, 0, 0, 0, 0, more)) for x in (blob.keys, blob.values))
    whole = KVBlob(keys=keys, values=values, heads=blob.heads)
    with torch.inference_mode():
        session.cache = session.backend.kv.import_blocks(session.cache, group, ids, whole)


def copy(session: Session, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Each of `sources` to its target; padding copies the null block onto itself."""
    pairs = np.ascontiguousarray(np.stack((padded(sources), padded(targets)), axis=1))
    with torch.inference_mode():
        session.cache = session.backend.kv.copy_blocks(session.cache, group, pairs)


def tokens(blob: KVBlob, first: int, end: int) -> KVBlob:
    """Those of `blob` from `first` up to `end`."""
    return KVBlob(keys=blob.keys[:, first:end], values=blob.values[:, first:end], heads=blob.heads)


def blocks_of(blob: KVBlob, indices: Sequence[int], block_size: int) -> KVBlob:
    """The blocks of `blob` at `indices`, in that order."""
    at = torch.tensor(indices)

    def taken(x: Tensor) -> Tensor:
        paged = x.reshape(x.shape[0], -1, block_size, *x.shape[2:])
        return paged.index_select(1, at).flatten(1, 2)

    return KVBlob(keys=taken(blob.keys), values=taken(blob.values), heads=blob.heads)


def everything(session: Session) -> list[KVBlob]:
    """Per KV group, all blocks but the null block."""
    return [_all_blocks(session, group) for group in range(len(session.plans))]


def expect_same(found: KVBlob, wanted: KVBlob, what: str) -> None:
    """Bit by bit, but for the bits of a nan."""
    for name in ("keys", "values"):
        x, y = getattr(found, name), getattr(wanted, name)
        assert x.dtype == y.dtype, f"{name} of {what} are {x.dtype}, not {y.dtype}"
        assert x.shape == y.shape, f"{name} of {what} have shape {x.shape}, not {y.shape}"
        differ = int(((x != y) & ~(x.isnan() & y.isnan())).sum())
        assert not differ, f"{differ} of {x.numel()} {name} of {what} differ"


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
    parts = [
        session.export(group, blocks[first : first + 64]) for first in range(0, len(blocks), 64)
    ]
    return KVBlob(
        keys=torch.cat([part.keys for part in parts], 1),
        values=torch.cat([part.values for part in parts], 1),
        heads=parts[0].heads,
    )
