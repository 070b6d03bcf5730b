from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from chipset.backends.reference.runtime import HostRuntime
from chipset.core.layers.rope import Rope
from chipset.core.layers.rotary import Rotary, inverse_frequencies, rope_tables
from chipset.core.models.families import read_config
from chipset.core.models.fields import Fields

PUBLISHED: dict[str, dict[str, Any]] = {
    "llama 3.1": {
        "rope_theta": 500000.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "qwen 3 at 131072": {
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn with mscale": {
        "rope_theta": 10000.0,
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 0.8,
        "mscale_all_dim": 1.2,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "linear": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
}


def read_rope(architecture: str, config: Any) -> Rope:
    rope = read_config(Fields({**config.to_dict(), "architectures": [architecture]}, "test")).rope
    assert rope is not None
    return rope


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_scalings_are_those_of_transformers(name: str) -> None:
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters=dict(PUBLISHED[name]),
    )
    rope = read_rope("LlamaForCausalLM", config)
    theirs, factor = ROPE_INIT_FUNCTIONS[PUBLISHED[name]["rope_type"]](config)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    torch.testing.assert_close(inverse_frequencies(rope, 131072), theirs, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("context", "seq_len"), [(4096, None), (4097, 4097), (131072, 131072)])
def test_longrope_chooses_by_the_served_context(context: int, seq_len: int | None) -> None:
    short = [1.0 + 0.01 * i for i in range(48)]
    config = Phi3Config(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        rope_parameters={
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": [3 * f for f in short],
        },
    )
    rope = read_rope("Phi3ForCausalLM", config)
    theirs, factor = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=seq_len)
    assert rope.rotary_size == 96
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    torch.testing.assert_close(inverse_frequencies(rope, context), theirs, rtol=1e-6, atol=0)


def test_tables_hold_the_attention_factor_and_every_position() -> None:
    rope = Rope(theta=100.0, rotary_size=4, attention_factor=1.5)
    cos, sin = rope_tables(rope, 7)
    assert cos.shape == sin.shape == (7, 2)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos**2 + sin**2, torch.full((7, 2), 2.25))
    assert cos[3, 1].item() == pytest.approx(1.5 * torch.tensor(0.3).cos().item())


def test_positions_pick_rows() -> None:
    rope = Rope(theta=100.0, rotary_size=4)
    cos, sin = rope_tables(rope, 7)
    picked = Rotary(rope, 7, HostRuntime())(torch.tensor([6, 0, 6], dtype=torch.int32))
    assert torch.equal(picked[0], cos[[6, 0, 6]])
    assert torch.equal(picked[1], sin[[6, 0, 6]])
