from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from chipset.backends.kv_cache import KVBlob, KVPlan
from chipset.backends.plugin import Launch
from chipset.backends.reference.kv_cache import PagedCache, ReferenceKVCache
from chipset.backends.reference.runtime import HostRuntime
from chipset.backends.runtime import MemoryInfo
from chipset.plugins.cpu.kv_cache import FAIR_SHARE, CPUKVCache

BLOCK = 16
MakeLaunch = Callable[[], Launch]


class Device(HostRuntime):
    """Memory as the test says."""

    def __init__(self, *infos: MemoryInfo) -> None:
        self.infos = list(infos)

    def memory(self) -> MemoryInfo | None:
        return self.infos.pop(0) if len(self.infos) > 1 else self.infos[0]


@pytest.fixture(params=[True, False], ids=["in place", "functional"])
def kv(request: pytest.FixtureRequest, launch: MakeLaunch) -> ReferenceKVCache:
    return ReferenceKVCache(HostRuntime(), launch(), in_place=request.param)


def allocated(kv: ReferenceKVCache) -> PagedCache:
    """Zeroed, for blocks may start with anything."""
    plans = zip(kv.launch.model.groups, (6, 4), strict=True)
    cache = kv.allocate([KVPlan(group=group, num_blocks=n) for group, n in plans])
    for tensor in (*cache.keys.values(), *cache.values.values()):
        tensor.zero_()
    return cache


def blob(num_blocks: int, layers: int, value_size: int, dtype: torch.dtype) -> KVBlob:
    keys = torch.randn(layers, num_blocks * BLOCK, 2, 8).to(dtype)
    values = torch.randn(layers, num_blocks * BLOCK, 2, value_size).to(dtype)
    return KVBlob(keys=keys, values=values, heads=(0, 2))


def i32(*values: object) -> np.ndarray:
    return np.array(values, np.int32)


def test_a_block_takes_keys_and_values_of_all_its_layers(kv: ReferenceKVCache) -> None:
    full, sliding = kv.launch.model.groups
    assert kv.block_bytes(full) == 2 * BLOCK * 2 * (8 + 8) * 4
    assert kv.block_bytes(sliding) == 1 * BLOCK * 2 * (8 + 6) * 2


def test_what_is_allocated_is_what_block_bytes_says(kv: ReferenceKVCache) -> None:
    cache, (full, sliding) = allocated(kv), kv.launch.model.groups
    tensors = [*cache.keys.values(), *cache.values.values()]
    assert sum(t.nbytes for t in tensors) == 6 * kv.block_bytes(full) + 4 * kv.block_bytes(sliding)
    assert cache.last_ids.nbytes + cache.counts.nbytes == kv.slot_bytes


@pytest.mark.parametrize(
    ("group", "layers", "size", "dtype"), [(0, 2, 8, torch.float32), (1, 1, 6, torch.bfloat16)]
)
def test_what_is_imported_is_exported_again(
    kv: ReferenceKVCache, group: int, layers: int, size: int, dtype: torch.dtype
) -> None:
    given = blob(2, layers, size, dtype)
    cache = kv.import_blocks(allocated(kv), group, i32(3, 1), given)
    found = kv.export_blocks(cache, group, i32(1, 3)).result()
    assert found.heads == (0, 2)
    for name in ("keys", "values"):
        x, y = getattr(found, name), getattr(given, name)
        assert x.dtype == dtype
        assert torch.equal(x[:, :BLOCK], y[:, BLOCK:])
        assert torch.equal(x[:, BLOCK:], y[:, :BLOCK])


@pytest.fixture(params=[True, False], ids=["in place", "functional"])
def int8(request: pytest.FixtureRequest, launch: MakeLaunch) -> ReferenceKVCache:
    """Whose second group holds int8."""
    made = launch()
    full, sliding = made.model.groups
    groups = (full, replace(sliding, dtype="int8"))
    made = replace(made, model=replace(made.model, groups=groups))
    return ReferenceKVCache(HostRuntime(), made, in_place=request.param)


def int8_blob(num_blocks: int) -> KVBlob:
    size = (1, num_blocks * BLOCK, 2)
    return KVBlob(
        keys=torch.randint(-127, 128, (*size, 8), dtype=torch.int8),
        values=torch.randint(-127, 128, (*size, 6), dtype=torch.int8),
        heads=(0, 2),
        key_scales=torch.rand(size),
        value_scales=torch.rand(size),
    )


def expect_equal(found: KVBlob, wanted: KVBlob) -> None:
    for name in ("keys", "values", "key_scales", "value_scales"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def test_scales_are_counted_and_allocated(int8: ReferenceKVCache) -> None:
    cache, (full, sliding) = allocated(int8), int8.launch.model.groups
    assert int8.block_bytes(sliding) == BLOCK * 2 * (8 + 6 + 2 * 4)
    tensors = [t for pages in cache[:4] for t in pages.values()]
    bytes_ = 6 * int8.block_bytes(full) + 4 * int8.block_bytes(sliding)
    assert sum(t.nbytes for t in tensors) == bytes_
    assert cache.key_scales.keys() == {1}


def test_scales_go_where_their_numbers_go(int8: ReferenceKVCache) -> None:
    given = int8_blob(2)
    cache = int8.import_blocks(allocated(int8), 1, i32(3, 1), given)
    expect_equal(int8.export_blocks(cache, 1, i32(3, 1)).result(), given)
    cache = int8.copy_blocks(cache, 1, i32([1, 2], [3, 1], [0, 0]))
    expect_equal(int8.export_blocks(cache, 1, i32(1, 2)).result(), given)


def test_an_export_is_no_view_of_the_cache(kv: ReferenceKVCache) -> None:
    given = blob(1, 2, 8, torch.float32)
    cache = kv.import_blocks(allocated(kv), 0, i32(2), given)
    found = kv.export_blocks(cache, 0, i32(2)).result()
    kv.import_blocks(cache, 0, i32(2), blob(1, 2, 8, torch.float32))
    assert torch.equal(found.keys, given.keys)


def test_blocks_are_copied_within_their_group(kv: ReferenceKVCache) -> None:
    given = blob(2, 2, 8, torch.float32)
    cache = kv.import_blocks(allocated(kv), 0, i32(1, 2), given)
    other = cache.keys[1].clone()
    cache = kv.copy_blocks(cache, 0, i32([1, 4], [2, 5], [0, 0]))
    found = kv.export_blocks(cache, 0, i32(4, 5)).result()
    assert torch.equal(found.keys, given.keys)
    assert torch.equal(found.values, given.values)
    assert torch.equal(cache.keys[1], other)


def test_a_slot_is_reset_to_the_counts_of_its_request(kv: ReferenceKVCache) -> None:
    counts = np.arange(100, dtype=np.int32)
    cache = kv.reset_slot(allocated(kv), 1, counts)
    counts[:] = 7
    assert cache.counts[1].tolist() == list(range(100))
    assert cache.counts[[0, 2, 3]].sum() == 0
    cache = kv.reset_slot(cache, 1, None)
    assert cache.counts[1].tolist() == list(range(100))


def test_in_place_and_functional_differ_in_what_becomes_of_the_old_cache(
    kv: ReferenceKVCache,
) -> None:
    old = allocated(kv)
    kv.import_blocks(old, 0, i32(1), blob(1, 2, 8, torch.float32))
    kv.reset_slot(old, 0, np.ones(100, np.int32))
    assert bool(old.keys[0].any()) == kv.in_place
    assert bool(old.counts.any()) == kv.in_place


def test_a_profiled_budget_leaves_room_for_the_largest_step(launch: MakeLaunch) -> None:
    before = MemoryInfo(free=600_000, total=1_000_000, peak=400_000)
    after = MemoryInfo(free=600_000, total=1_000_000, peak=500_000)
    kv, ran = ReferenceKVCache(Device(before, after), launch()), []
    found = kv.budget(0.9, lambda: ran.append(1))
    assert ran == [1]
    assert found == 900_000 - 400_000 - 100_000 - kv.slot_bytes


def test_the_cpu_takes_a_share_of_what_is_left(launch: MakeLaunch) -> None:
    free = 10**9
    kv = CPUKVCache(Device(MemoryInfo(free=free, total=10**10, peak=0)), launch())
    assert kv.step_bytes > 0
    assert kv.budget(0.5, None) == free // 2 - kv.slot_bytes - kv.step_bytes
    rich = CPUKVCache(Device(MemoryInfo(free=10**12, total=10**12, peak=0)), launch())
    assert rich.budget(0.9, None) == FAIR_SHARE
    tiny = CPUKVCache(Device(MemoryInfo(free=1000, total=10**10, peak=0)), launch())
    assert tiny.budget(0.9, None) == 0


def test_ranks_of_the_cpu_share_what_is_left(launch: MakeLaunch) -> None:
    free, one = 10**9, launch()
    half = CPUKVCache(
        Device(MemoryInfo(free=free, total=10**10, peak=0)), replace(one, world_size=2)
    )
    assert half.budget(0.5, None) == free // 4 - half.slot_bytes - half.step_bytes
    rich = CPUKVCache(
        Device(MemoryInfo(free=10**12, total=10**12, peak=0)), replace(one, world_size=2)
    )
    assert rich.budget(0.9, None) == FAIR_SHARE // 2
