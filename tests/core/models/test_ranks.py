"""Ranks together compute what one rank computes alone, for every architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from chipset.backends.collectives import Collectives
from chipset.core.models.build import build_decoder
from chipset.core.models.config import ModelConfig
from chipset.core.models.shard import Shard
from chipset.core.models.spec import model_spec
from chipset.core.models.tensors import checkpoint_layout

from .cases import CASES, TINY, Case
from .harness import MAX_CONTEXT, TOLERANCE, Checkpoint, Session, cpu_backend, difference
from .ranks import Ranks

BY_NAME = {case.name: case for case in CASES}
NINE_HEADS = Case(
    name="nine heads, three for KV",
    architecture="LlamaForCausalLM",
    mechanism="",
    settings={
        **TINY,
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "attention_bias": True,
        "mlp_bias": True,
    },
    faults=(),
)
MULTI_QUERY = replace(
    NINE_HEADS,
    name="one KV head",
    settings={**NINE_HEADS.settings, "num_key_value_heads": 1, "num_attention_heads": 6},
)
Make = Callable[[Case], Checkpoint]


def run_ranks(checkpoint: Checkpoint, size: int) -> list[tuple[Tensor, ...]]:
    """Of each rank, logits of every token of every text."""

    def work(rank: int, comm: Collectives) -> tuple[Tensor, ...]:
        shard = Shard(rank=rank, size=size)
        session = Session(checkpoint, checkpoint.config, shard=shard, comm=comm)
        return session.run(checkpoint.texts)

    return Ranks(size).run(work)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_compute_what_one_computes(checkpoint: Checkpoint, size: int) -> None:
    for logits in run_ranks(checkpoint, size):
        assert difference(checkpoint, logits) <= TOLERANCE


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("case", [NINE_HEADS, MULTI_QUERY], ids=lambda case: case.name)
def test_heads_that_do_not_divide_are_padded_or_repeated(
    case: Case, size: int, checkpoint_of: Make
) -> None:
    checkpoint = checkpoint_of(case)
    first, *others = run_ranks(checkpoint, size)
    assert difference(checkpoint, first) <= TOLERANCE
    for logits in others:
        assert all(map(torch.equal, logits, first))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_all_ranks_hold_parts_of_one_size(checkpoint: Checkpoint, size: int) -> None:
    layouts = [checkpoint_layout(checkpoint.config, Shard(rank=r, size=size)) for r in range(size)]
    shapes = [
        {(name, kind): m.shape(kind) for name, m in layout.modules.items() for kind in m.kinds}
        for layout in layouts
    ]
    assert all(held == shapes[0] for held in shapes)
    specs = {
        model_spec(checkpoint.config, dtype="float32", shard=Shard(rank=rank, size=size))
        for rank in range(size)
    }
    assert len(specs) == 1
    assert specs.pop().weight_bytes == 4 * layouts[0].num_parameters


def read_by_ranks(checkpoint: Checkpoint, config: ModelConfig, size: int) -> list[int]:
    """Bytes of weights that each rank reads."""

    def work(rank: int, comm: Collectives) -> int:
        shard, source = Shard(rank=rank, size=size), checkpoint.source()
        spec = model_spec(config, dtype="float32", max_context=MAX_CONTEXT, shard=shard)
        backend = cpu_backend(spec)
        assert source.bytes_read == 0
        build_decoder(config, spec, backend, source, shard=shard)
        return source.bytes_read

    return Ranks(size).run(work)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_read_their_own_bytes_only(checkpoint: Checkpoint, size: int) -> None:
    config = checkpoint.config
    source = checkpoint.source()
    total = sum(entry.num_bytes for entry in source.weights.values())
    everywhere = sum(
        entry.num_bytes
        for name, entry in source.weights.items()
        if "norm" in name or "ln_f" in name or name.endswith(".gate.weight")
    )
    again = 0
    if size > config.num_kv_heads:
        # the rows of k and v, fused with q in some checkpoints, of the heads that two ranks hold
        copies = size // config.num_kv_heads - 1
        rows = 2 * config.num_kv_heads * config.head_size
        biases = config.num_layers * rows * 4 * config.qkv_bias
        again = copies * (config.num_layers * rows * config.hidden_size * 4 + biases)
    read = read_by_ranks(checkpoint, config, size)
    assert sum(read) == total + (size - 1) * everywhere + again
