"""KVBlobs on the host: made, cut and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kv_cache import KVBlob
from ..options import KVGroup
from ..reference.dtypes import torch_dtype


def random_blob(group: KVGroup, num_tokens: int, seed: int) -> KVBlob:
    """No number of which is likely to be anywhere else."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(group.layers), num_tokens, group.num_kv_heads)
    dtype = torch_dtype(group.dtype)

    def numbers(width: int) -> Tensor:
        if dtype == torch.int8:
            return torch.randint(-127, 128, (*size, width), generator=generator, dtype=dtype)
        return torch.randn(*size, width, generator=generator).to(dtype)

    def scales() -> Tensor | None:
        # such as float16 holds too
        found = torch.rand(size, generator=generator).add(0.01).half().float()
        return found if dtype == torch.int8 else None

    return KVBlob(
        keys=numbers(group.head_size),
        values=numbers(group.value_size),
        heads=(0, group.num_kv_heads),
        key_scales=scales(),
        value_scales=scales(),
    )


def filled_blob(group: KVGroup, num_tokens: int, value: float) -> KVBlob:
    """Of which each number is worth `value`."""
    size = (len(group.layers), num_tokens, group.num_kv_heads)
    dtype = torch_dtype(group.dtype)
    is_scaled = dtype == torch.int8
    number = 1 if is_scaled else value
    return KVBlob(
        keys=torch.full((*size, group.head_size), number, dtype=dtype),
        values=torch.full((*size, group.value_size), number, dtype=dtype),
        heads=(0, group.num_kv_heads),
        key_scales=torch.full(size, value) if is_scaled else None,
        value_scales=torch.full(size, value) if is_scaled else None,
    )


def tokens(blob: KVBlob, first: int, end: int) -> KVBlob:
    """Those of `blob` from `first` up to `end`."""
    return _each(lambda x: x[:, first:end], blob)


def blocks_of(blob: KVBlob, indices: Sequence[int], block_size: int) -> KVBlob:
    """The blocks of `blob` at `indices`, in that order."""
    at = torch.tensor(indices)

    def taken(x: Tensor) -> Tensor:
        paged = x.reshape(x.shape[0], -1, block_size, *x.shape[2:])
        return paged.index_select(1, at).flatten(1, 2)

    return _each(taken, blob)


def followed_by_zeros(blob: KVBlob, num_tokens: int) -> KVBlob:
    """With so many tokens more."""
    return _each(lambda x: torch.cat((x, x.new_zeros(len(x), num_tokens, *x.shape[2:])), 1), blob)


def joined(blobs: Sequence[KVBlob]) -> KVBlob:
    """One after the other."""
    return _each(lambda *parts: torch.cat(parts, 1), *blobs)


def expect_same(found: KVBlob, wanted: KVBlob, what: str, *, near: float = 0.0) -> None:
    """Bit by bit, but for the bits of a nan, and scales that are `near` as a share of themselves."""
    for name in ("keys", "values", "key_scales", "value_scales"):
        x, y = getattr(found, name), getattr(wanted, name)
        assert (x is None) == (y is None), f"{name} of {what} are there, or should be"
        if x is None:
            continue
        assert x.dtype == y.dtype, f"{name} of {what} are {x.dtype}, not {y.dtype}"
        assert x.shape == y.shape, f"{name} of {what} have shape {x.shape}, not {y.shape}"
        differ = (x != y) & ~(x.isnan() & y.isnan())
        if name.endswith("scales"):
            differ &= ~((x - y).abs() <= near * y.abs())
        count = int(differ.sum())
        assert not count, f"{count} of {x.numel()} {name} of {what} differ"


def _each(change: Callable[..., Tensor], *blobs: KVBlob) -> KVBlob:
    """`change` of what the blobs hold, part by part."""

    def changed(*parts: Tensor | None) -> Tensor | None:
        return None if parts[0] is None else change(*parts)

    return KVBlob(
        keys=change(*(blob.keys for blob in blobs)),
        values=change(*(blob.values for blob in blobs)),
        heads=blobs[0].heads,
        key_scales=changed(*(blob.key_scales for blob in blobs)),
        value_scales=changed(*(blob.value_scales for blob in blobs)),
    )
