"""The KV cache as plain tensors, one pair a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kv_cache import Cache, KVBlob, KVCache, KVPlan
from ..options import KVGroup
from ..plugin import Launch
from ..runtime import Pending, Runtime
from ..step import I32
from .dtypes import torch_dtype
from .kv_numbers import SCALE_DTYPE
from .runtime import Ready

PAGES = ("keys", "values", "key_scales", "value_scales")
"""The fields of PagedCache that hold blocks; KVBlob has the same."""


class PagedCache(NamedTuple):
    """What `allocate` makes; a pytree as it is."""

    keys: Mapping[int, Tensor]
    """Layer -> [blocks, B, Hkv, D]"""
    values: Mapping[int, Tensor]
    """Layer -> [blocks, B, Hkv, Dv]"""
    key_scales: Mapping[int, Tensor]
    """Layer whose keys are int8 -> f32 [blocks, B, Hkv]"""
    value_scales: Mapping[int, Tensor]
    """The same of values"""
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
        """Keys and values of all layers of the group, and their scales."""
        dtype = torch_dtype(group.dtype)
        head = (group.head_size + group.value_size) * dtype.itemsize
        if dtype == torch.int8:
            head += 2 * SCALE_DTYPE.itemsize
        return len(group.layers) * self.block_size * group.num_kv_heads * head

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
        pages: dict[str, dict[int, Tensor]] = {name: {} for name in PAGES}
        for plan in plans:
            group = plan.group
            shape = (plan.num_blocks, self.block_size, group.num_kv_heads)
            dtype = torch_dtype(group.dtype)
            for layer in group.layers:
                pages["keys"][layer] = self._blank(*shape, group.head_size, dtype=dtype)
                pages["values"][layer] = self._blank(*shape, group.value_size, dtype=dtype)
                if dtype == torch.int8:
                    pages["key_scales"][layer] = self._blank(*shape, dtype=SCALE_DTYPE)
                    pages["value_scales"][layer] = self._blank(*shape, dtype=SCALE_DTYPE)
        return PagedCache(
            **pages,
            last_ids=self._zeros(self.num_slots + 1),
            counts=self._zeros(self.num_slots + 1, self.counted),
        )

    def copy_blocks(self, cache: Cache, group: int, pairs: I32) -> Cache:
        """See KVCache.copy_blocks."""
        source, target = self._put(pairs[:, 0]), self._put(pairs[:, 1])

        def copied(name: str, index: int, pages: Tensor) -> Tensor:  # noqa: ARG001
            return self._set(pages, target, pages.index_select(0, source))

        return self._map_pages(cache, group, copied)

    def export_blocks(self, cache: Cache, group: int, blocks: I32) -> Pending[KVBlob]:
        """See KVCache.export_blocks."""
        blob = self._taken(cache, group, blocks)
        held = {name: getattr(blob, name) for name in PAGES}
        return Ready(replace(blob, **{n: x.cpu() for n, x in held.items() if x is not None}))

    def import_blocks(self, cache: Cache, group: int, blocks: I32, blob: KVBlob) -> Cache:
        """See KVCache.import_blocks."""
        at = self._put(blocks)

        def imported(name: str, index: int, pages: Tensor) -> Tensor:
            tokens = self.runtime.put(getattr(blob, name)[index].contiguous())
            return self._set(pages, at, tokens.reshape(-1, self.block_size, *tokens.shape[1:]))

        return self._map_pages(cache, group, imported)

    def reset_slot(self, cache: Cache, slot: int, counts: I32 | None) -> Cache:
        """See KVCache.reset_slot."""
        if counts is None or self.counted == 0:
            return cache
        at = self.runtime.put(torch.tensor([slot], dtype=torch.int32))
        row = self._put(counts)[None]
        return cache._replace(counts=self._set(cache.counts, at, row))

    def _taken(self, cache: PagedCache, group: int, blocks: I32) -> KVBlob:
        """Copies of `blocks`, still on the device."""
        at, layers = self._put(blocks), self.plans[group].group.layers

        def taken(pages: Mapping[int, Tensor]) -> Tensor:
            return torch.stack([pages[n].index_select(0, at).flatten(0, 1) for n in layers])

        has_scales = layers[0] in cache.key_scales
        keys = taken(cache.keys)
        return KVBlob(
            keys=keys,
            values=taken(cache.values),
            heads=(0, keys.shape[2]),
            key_scales=taken(cache.key_scales) if has_scales else None,
            value_scales=taken(cache.value_scales) if has_scales else None,
        )

    def _blank(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.runtime.device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.runtime.device)

    def _put(self, array: I32) -> Tensor:
        # a copy, for the array stays the caller's and may change before the device has read it
        return self.runtime.put(torch.from_numpy(array.copy()))

    def _set(self, whole: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        rows = rows.to(whole.dtype)
        if self.in_place:
            return whole.index_put_((at,), rows)
        return whole.index_put((at,), rows)

    def _map_pages(
        self, cache: PagedCache, group: int, change: Callable[[str, int, Tensor], Tensor]
    ) -> PagedCache:
        """`change` (field, index of the layer in its group, its pages) wherever the group's layers have any."""
        layers = self.plans[group].group.layers

        def changed(name: str) -> Mapping[int, Tensor]:
            pages: dict[int, Tensor] = dict(getattr(cache, name))
            for index, layer in enumerate(layers):
                if layer in pages:
                    pages[layer] = change(name, index, pages[layer])
            return pages

        return cache._replace(
            keys=changed("keys"),
            values=changed("values"),
            key_scales=changed("key_scales"),
            value_scales=changed("value_scales"),
        )
