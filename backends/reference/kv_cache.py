"""The KV cache as plain tensors, one pair a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kv_cache import Cache, KVBlob, KVCache, KVPlan
from ..options import KVGroup
from ..plugin import Launch
from ..runtime import Pending, Runtime
from ..step import I32
from .dtypes import torch_dtype
from .runtime import Ready


class PagedCache(NamedTuple):
    """What `allocate` makes; a pytree as it is."""

    keys: Mapping[int, Tensor]
    """Layer -> [blocks, B, Hkv, D]"""
    values: Mapping[int, Tensor]
    """Layer -> [blocks, B, Hkv, Dv]"""
    last_ids: Tensor
    """[slots + 1] i32 last drawn id"""
    counts: Tensor
    """[slots + 1, V] i32 times drawn, plus 2**30 where the prompt holds the token; V is 0 without penalties."""


class ReferenceKVCache(KVCache):
    """Plain torch. With in_place=False no tensor is written to: members return a new cache."""

    def __init__(self, runtime: Runtime, launch: Launch, *, in_place: bool = True) -> None:
        self.runtime = runtime
        self.launch = launch
        self.in_place = in_place
        self.block_size = launch.options.block_size
        self.num_slots = launch.options.max_batch_rows
        has_penalties = "penalties" in launch.capabilities.features
        self.counted = launch.model.vocab_size if has_penalties else 0
        self.plans: tuple[KVPlan, ...] = ()

    @property
    def slot_bytes(self) -> int:
        """What the request slots take, the sink too."""
        return (self.num_slots + 1) * (1 + self.counted) * torch.int32.itemsize

    def block_bytes(self, group: KVGroup) -> int:
        """Keys and values of all layers of the group."""
        token = group.num_kv_heads * (group.head_size + group.value_size)
        return len(group.layers) * self.block_size * token * torch_dtype(group.dtype).itemsize

    def budget(self, utilisation: float, largest_step: Callable[[], None] | None) -> int:
        """`utilisation` of the device, less what is in use and the most that the largest step took beside it."""
        before = self.runtime.memory()
        if before is None:
            return 0
        used, step = before.total - before.free, 0
        if largest_step is not None:
            largest_step()
            after = self.runtime.memory()
            assert after is not None
            step = max(0, after.peak - used)
        return max(0, int(utilisation * before.total) - used - step - self.slot_bytes)

    def allocate(self, plans: Sequence[KVPlan]) -> PagedCache:
        """Blocks start with whatever was there, as recycled ones do: a host then pays for what it writes only.

        The null block takes padding, so there is no sink beside it.
        """
        self.plans = tuple(plans)
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        for plan in plans:
            group = plan.group
            shape = (plan.num_blocks, self.block_size, group.num_kv_heads)
            for layer in group.layers:
                keys[layer] = self._blank(*shape, group.head_size, dtype=group.dtype)
                values[layer] = self._blank(*shape, group.value_size, dtype=group.dtype)
        return PagedCache(
            keys=keys,
            values=values,
            last_ids=self._zeros(self.num_slots + 1, dtype="int32"),
            counts=self._zeros(self.num_slots + 1, self.counted, dtype="int32"),
        )

    def copy_blocks(self, cache: Cache, group: int, pairs: I32) -> Cache:
        """See KVCache.copy_blocks."""
        source, target = self._put(pairs[:, 0]), self._put(pairs[:, 1])

        def copied(pages: Tensor, _: int) -> Tensor:
            return self._set(pages, target, pages.index_select(0, source))

        return self._map_layers(cache, group, copied, copied)

    def export_blocks(self, cache: Cache, group: int, blocks: I32) -> Pending[KVBlob]:
        """See KVCache.export_blocks."""
        at, layers = self._put(blocks), self.plans[group].group.layers

        def exported(pages: Mapping[int, Tensor]) -> Tensor:
            found = [pages[layer].index_select(0, at).flatten(0, 1) for layer in layers]
            return torch.stack(found).cpu()

        keys, values = exported(cache.keys), exported(cache.values)
        return Ready(KVBlob(keys=keys, values=values, heads=(0, keys.shape[2])))

    def import_blocks(self, cache: Cache, group: int, blocks: I32, blob: KVBlob) -> Cache:
        """See KVCache.import_blocks."""
        at = self._put(blocks)

        def imported(source: Tensor) -> Callable[[Tensor, int], Tensor]:
            def one(pages: Tensor, index: int) -> Tensor:
                tokens = self.runtime.put(source[index].contiguous())
                return self._set(pages, at, tokens.reshape(-1, self.block_size, *tokens.shape[1:]))

            return one

        return self._map_layers(cache, group, imported(blob.keys), imported(blob.values))

    def reset_slot(self, cache: Cache, slot: int, counts: I32 | None) -> Cache:
        """See KVCache.reset_slot."""
        if counts is None or self.counted == 0:
            return cache
        at = self.runtime.put(torch.tensor([slot], dtype=torch.int32))
        row = self._put(counts)[None]
        return cache._replace(counts=self._set(cache.counts, at, row))

    def _blank(self, *shape: int, dtype: str) -> Tensor:
        return torch.empty(shape, dtype=torch_dtype(dtype), device=self.runtime.device)

    def _zeros(self, *shape: int, dtype: str) -> Tensor:
        return torch.zeros(shape, dtype=torch_dtype(dtype), device=self.runtime.device)

    def _put(self, array: I32) -> Tensor:
        # a copy, for the array stays the caller's and may change before the device has read it
        return self.runtime.put(torch.from_numpy(array.copy()))

    def _set(self, whole: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        rows = rows.to(whole.dtype)
        if self.in_place:
            return whole.index_put_((at,), rows)
        return whole.index_put((at,), rows)

    def _map_layers(
        self,
        cache: PagedCache,
        group: int,
        of_keys: Callable[[Tensor, int], Tensor],
        of_values: Callable[[Tensor, int], Tensor],
    ) -> PagedCache:
        keys, values = dict(cache.keys), dict(cache.values)
        for index, layer in enumerate(self.plans[group].group.layers):
            keys[layer] = of_keys(keys[layer], index)
            values[layer] = of_values(values[layer], index)
        return cache._replace(keys=keys, values=values)
