"""A launch of the CPU plugin for a small model of two KV groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from chipset.backends.options import AttentionSpec, EngineOptions, KVGroup, ModelSpec
from chipset.backends.plugin import Launch, WorkerSpec
from chipset.plugins.cpu.plugin import CPUPlugin

GROUPS = (
    KVGroup(kind="full", layers=(0, 2), num_kv_heads=2, head_size=8, value_size=8, dtype="float32"),
    KVGroup(
        kind="sliding",
        layers=(1,),
        num_kv_heads=2,
        head_size=8,
        value_size=6,
        dtype="bfloat16",
        window=16,
    ),
)
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=8, value_size=8, scale=0.4, group=0)
MODEL = ModelSpec(
    architecture="TestForCausalLM",
    num_layers=3,
    hidden_size=32,
    vocab_size=100,
    max_context=256,
    dtype="float32",
    weight_bytes=1000,
    groups=GROUPS,
    attention=(SPEC, replace(SPEC, group=1, window=16, value_size=6)),
)


@pytest.fixture
def launch() -> Callable[[], Launch]:
    def make() -> Launch:
        plugin = CPUPlugin()
        capabilities = plugin.capabilities(plugin.probe())
        options = EngineOptions(dtype="float32", block_size=16, max_batch_rows=3)
        resolved = plugin.resolve(options, MODEL, capabilities)
        return Launch(
            plugin="cpu",
            worker=WorkerSpec(rank=0, local_rank=0, host=0, devices=(0,)),
            world_size=1,
            rendezvous="",
            groups={},
            capabilities=capabilities,
            options=resolved,
            model=MODEL,
            shapes=plugin.shapes(resolved, MODEL),
        )

    return make
