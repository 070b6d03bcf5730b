"""How many tokens a cache of each dtype holds, by the sizes that the engine works with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chipset.backends.conformance.session import make_launch
from chipset.backends.conformance.suite import small_model
from chipset.backends.options import AttentionSpec, EngineOptions
from chipset.backends.reference.runtime import HostRuntime
from chipset.core.kv_cache.sizing import size_groups
from chipset.plugins.cpu.kv_cache import CPUKVCache
from chipset.plugins.cpu.plugin import CPUPlugin

SPEC = AttentionSpec(num_heads=9, num_kv_heads=3, head_size=64, value_size=64, scale=0.125, group=0)
BUDGET = 64 * 2**20


def kv_cache(kv_dtype: str) -> CPUKVCache:
    """Of the default model's shape: 30 layers of 3 key heads of 64."""
    model = small_model([SPEC], dtype="bfloat16", kv_dtype=kv_dtype, layers_per_group=30)
    model = replace(model, max_context=8192)
    options = EngineOptions(dtype="bfloat16", kv_dtype=kv_dtype)
    return CPUKVCache(HostRuntime(), make_launch(CPUPlugin(), model, options))


def num_tokens(kv: CPUKVCache) -> int:
    """That BUDGET holds."""
    groups, options = kv.launch.model.groups, kv.launch.options
    return size_groups(
        groups,
        [kv.block_bytes(group) for group in groups],
        BUDGET,
        block_size=options.block_size,
        max_rows=options.max_batch_rows,
        max_step_tokens=options.max_batch_tokens,
        max_context=options.max_context,
    ).num_tokens


@pytest.mark.parametrize(
    ("kv_dtype", "least"), [("float8_e4m3fn", 1.95), ("float8_e5m2", 1.95), ("int8", 1.85)]
)
def test_the_same_memory_holds_nearly_twice_as_many_tokens_scales_counted(
    kv_dtype: str, least: float
) -> None:
    ratio = num_tokens(kv_cache(kv_dtype)) / num_tokens(kv_cache("bfloat16"))
    print(f"{kv_dtype}: {ratio:.3f} times the tokens of bfloat16")
    assert least <= ratio < 2.05


def test_the_largest_step_counts_what_is_gathered_and_what_is_computed_with() -> None:
    found = {name: kv_cache(name).step_bytes for name in ("float32", "int8")}
    context = kv_cache("int8").launch.options.max_context
    assert found["float32"] - found["int8"] == context * 3 * 128 * (4 - 1)
