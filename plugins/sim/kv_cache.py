"""The KV cache on the emulated device: full of nan at first, and given away where the device wants it so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends.kv_cache import Cache, KVBlob, KVPlan
from ...backends.plugin import Launch
from ...backends.reference.kv_cache import PAGES, PagedCache, ReferenceKVCache
from ...backends.runtime import Pending
from ...backends.step import I32
from . import device, watch
from .donation import Donation
from .rules import RuleBroken
from .runtime import SimRuntime

GARBAGE = -99
"""Of whole numbers, which know no nan."""
NUM_TEXTS = 4
"""Texts of the longest context that the cache holds unasked: few, so that tests run out of blocks."""


class Export(Pending[KVBlob]):
    """Some blocks, their parts of equal dtype end to end in one tensor on the device."""

    def __init__(self, blob: KVBlob) -> None:
        self._heads = blob.heads
        held = {name: getattr(blob, name) for name in PAGES}
        self._parts: dict[str, Tensor] = {n: x for n, x in held.items() if x is not None}
        self._flat = {
            dtype: torch.cat([x.reshape(-1) for x in self._parts.values() if x.dtype == dtype])
            for dtype in {x.dtype for x in self._parts.values()}
        }

    def done(self) -> bool:
        """Always: the emulated device is synchronous."""
        return True

    def result(self) -> KVBlob:
        """One copy per dtype."""
        with watch.reading():
            left = {dtype: flat.cpu() for dtype, flat in self._flat.items()}
        found: dict[str, Any] = {}
        for name, part in self._parts.items():
            mine, left[part.dtype] = left[part.dtype].tensor_split([part.numel()])
            found[name] = mine.reshape(part.shape)
        return KVBlob(**found, heads=self._heads)


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
        return Export(self._taken(cache, group, blocks))

    def _rebind(self, old: Cache, new: Cache) -> Cache:
        if not self.in_place:
            self.donation.replace(old, new)
        return new

    def _blank(self, *shape: int, dtype: torch.dtype) -> Tensor:
        # as if recycled from another model, the null block too
        garbage = float("nan") if dtype.is_floating_point else GARBAGE
        return super()._blank(*shape, dtype=dtype).fill_(garbage)
