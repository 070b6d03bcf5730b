"""Blocks of a GGUF file stay packed through the build, whole and cut, rotary rows in their order."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind
from torch import Tensor

from chipset.core.loading.gguf_config import model_config
from chipset.core.loading.gguf_file import read_gguf
from chipset.core.loading.gguf_source import GgufSource
from chipset.core.models.families import read_config
from chipset.core.models.fields import Fields
from chipset.core.models.shard import Shard
from chipset.core.quantization.ggml import BLOCK_BYTES

from ..loading.ggufs import TOKENS, llama_keys, llama_tensors, write_gguf
from .harness import NUM_DECODE, PROMPTS, TOLERANCE, Checkpoint, Session
from .packing import Unpacking
from .ranks import Ranks

PACKED = ("token_embd", "blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_output")
PACKED += ("blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_down")


def write(path: Path, kind: Kind, value_kind: Kind) -> Path:
    kinds = {f"{name}.weight": kind for name in PACKED} | {"blk.0.attn_v.weight": value_kind}
    return write_gguf(path, llama_keys(), llama_tensors(np.random.default_rng(0)), kinds)


def run(path: Path, packed: bool, size: int) -> tuple[list[Tensor], list[Session]]:
    config = read_config(Fields(model_config(read_gguf(path)), str(path)))
    draw = random.Random(3)
    texts = tuple(
        tuple(draw.randrange(len(TOKENS)) for _ in range(length + NUM_DECODE)) for length in PROMPTS
    )
    checkpoint = Checkpoint(folder=path.parent, texts=texts, logits=())
    sessions: list[Session] = []

    def work(rank: int, comm: object) -> Tensor:
        session = Session(
            checkpoint,
            config,
            source=GgufSource(path, BLOCK_BYTES if packed else ()),
            shard=Shard(rank=rank, size=size),
            comm=comm,  # type: ignore[arg-type]
            linear=Unpacking,
        )
        sessions.append(session)
        return torch.cat(session.run(texts))

    return Ranks(size).run(work), sessions


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_blocks_are_served_as_what_they_are_worth(tmp_path: Path, kind: Kind, size: int) -> None:
    path = write(tmp_path / "model.gguf", kind, kind)
    (wanted,), _ = run(path, packed=False, size=1)
    found, sessions = run(path, packed=True, size=size)
    for logits in found:
        assert (logits - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    name = "int8" if kind == Kind.Q8_0 else "int4"
    for session in sessions:
        assert session.report.kernels == {f"{name} by any": 4, "plain by any": 1}
        assert session.report.dequantised == {"embeddings are looked up row by row": 1}


def test_a_decoded_type_lies_beside_packed_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", Kind.Q4_0, Kind.Q5_1)
    (wanted,), _ = run(path, packed=False, size=1)
    (found,), (session,) = run(path, packed=True, size=1)
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    assert session.report.kernels == {"int4 by any": 5, "plain by any": 2}
