"""The KV cache on the emulated device: full of nan at first, and given away where the device wants it so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...backends.kv_cache import Cache, KVBlob, KVPlan
from ...backends.plugin import Launch
from ...backends.reference.kv_cache import PagedCache, ReferenceKVCache
from ...backends.runtime import Pending
from ...backends.step import I32
from . import device, watch
from .donation import Donation
from .rules import RuleBroken
from .runtime import SimRuntime

NUM_TEXTS = 4
"""Texts of the longest context that the cache holds unasked: few, so that tests run out of blocks."""


class Export(Pending[KVBlob]):
    """Keys and values of some blocks, end to end in one tensor on the device."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._shapes = (keys.shape, values.shape)
        self._flat = torch.cat((keys.reshape(-1), values.reshape(-1)))

    def done(self) -> bool:
        """Always: the emulated device is synchronous."""
        return True

    def result(self) -> KVBlob:
        """One copy."""
        with watch.reading():
            host = self._flat.cpu()
        keys, values = torch.split(host, [shape.numel() for shape in self._shapes])
        heads = self._shapes[0][2]
        return KVBlob(
            keys=keys.reshape(self._shapes[0]),
            values=values.reshape(self._shapes[1]),
            heads=(0, heads),
        )


class SimKVCache(ReferenceKVCache):
    """Plain tensors; `is_fixed` says whether graphs were compiled for their sizes."""

    def __init__(
        self,
        runtime: SimRuntime,
        launch: Launch,
        donation: Donation,
        is_fixed: Callable[[], bool],
        *,
        in_place: bool,
    ) -> None:
        super().__init__(runtime, launch, in_place=in_place)
        self.donation = donation
        self.is_fixed = is_fixed

    def budget(self, utilisation: float, largest_step: Callable[[], None] | None) -> int:
        """What is asked of it: some texts of the longest context, or less where a measured step leaves less."""
        options = self.launch.options
        num_blocks = 1 + NUM_TEXTS * -(-options.max_context // self.block_size)
        wanted = num_blocks * sum(map(self.block_bytes, self.launch.model.groups))
        if largest_step is None:
            return wanted
        device.reset_peak_memory_stats()
        memory = self.runtime.memory()
        assert memory is not None
        graphs = int(options.graph_memory * memory.total)
        return max(0, min(wanted, super().budget(utilisation, largest_step) - graphs))

    def allocate(self, plans: Sequence[KVPlan]) -> PagedCache:
        """See KVCache.allocate. Raises RuleBroken where graphs were made for another size."""
        if self.is_fixed() and tuple(plans) != self.plans:
            raise RuleBroken("KV size", "it is part of every graph, and graphs are compiled")
        return super().allocate(plans)

    def usable(self, cache: Cache) -> bool:
        """See KVCache.usable."""
        return not self.donation.is_lost(cache)

    def copy_blocks(self, cache: Cache, group: int, pairs: I32) -> Cache:
        """See KVCache.copy_blocks."""
        return self._rebind(cache, super().copy_blocks(cache, group, pairs))

    def import_blocks(self, cache: Cache, group: int, blocks: I32, blob: KVBlob) -> Cache:
        """See KVCache.import_blocks."""
        return self._rebind(cache, super().import_blocks(cache, group, blocks, blob))

    def reset_slot(self, cache: Cache, slot: int, counts: I32 | None) -> Cache:
        """See KVCache.reset_slot."""
        return self._rebind(cache, super().reset_slot(cache, slot, counts))

    def export_blocks(self, cache: Cache, group: int, blocks: I32) -> Pending[KVBlob]:
        """See KVCache.export_blocks."""
        at, layers = self._put(blocks), self.plans[group].group.layers
        keys, values = (
            torch.stack([pages[n].index_select(0, at).flatten(0, 1) for n in layers])
            for pages in (cache.keys, cache.values)
        )
        return Export(keys, values)

    def _rebind(self, old: Cache, new: Cache) -> Cache:
        if not self.in_place:
            self.donation.replace(old, new)
        return new

    def _blank(self, *shape: int, dtype: str) -> Tensor:
        # as if recycled from another model, the null block too
        return super()._blank(*shape, dtype=dtype).fill_(float("nan"))
