"""Configs as their models were published, in the layouts of their time."""

from __future__ import annotations

from typing import Any

import pytest

from chipset.core.layers.rope import Llama3Scaling, LongRopeScaling, Rope
from chipset.core.models.config import ModelConfig
from chipset.core.models.families import read_config
from chipset.core.models.fields import Fields
from chipset.core.models.spec import model_spec

PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"],
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Mistral-7B-Instruct-v0.3": {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32768,
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Phi-3-mini-128k-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1.07] * 24 + [30.0] * 24,
            "short_factor": [1.1] * 48,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    "Mixtral-8x7B": {
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "bloom-560m": {
        "architectures": ["BloomForCausalLM"],
        "apply_residual_connection_post_layernorm": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "layer_norm_epsilon": 1e-05,
        "n_embed": 1024,
        "n_inner": None,
        "n_layer": 24,
        "num_attention_heads": 16,
        "offset_alibi": 100,
        "pretraining_tp": 1,
        "seq_length": 2048,
        "vocab_size": 250880,
    },
}

PARAMETERS = {
    "SmolLM2-135M-Instruct": 134_515_008,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.1": 7_241_732_096,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "Qwen3-0.6B": 596_049_920,
    "Phi-3-mini-128k-instruct": 3_821_079_552,
    "Mixtral-8x7B": 46_702_792_704,
    "bloom-560m": 559_214_592,
}
"""As the hub counts them."""


def read(name: str) -> ModelConfig:
    return read_config(Fields(PUBLISHED[name], f"{name}/config.json"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_the_published_one(name: str) -> None:
    assert model_spec(read(name), dtype="bfloat16").weight_bytes == 2 * PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("SmolLM2-135M-Instruct", Rope(theta=1e5, rotary_size=64)),
        ("Mistral-7B-v0.1", Rope(theta=1e4, rotary_size=128)),
        ("gemma-3-1b", Rope(theta=1e6, rotary_size=256)),
        ("Qwen3-0.6B", Rope(theta=1e6, rotary_size=128)),
    ],
)
def test_ropes_are_read(name: str, rope: Rope) -> None:
    assert read(name).rope == rope


def test_scaled_ropes_are_read() -> None:
    llama, phi = read("Llama-3.2-1B").rope, read("Phi-3-mini-128k-instruct").rope
    assert llama is not None
    assert llama.scaling == Llama3Scaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    assert phi is not None
    assert isinstance(phi.scaling, LongRopeScaling)
    assert phi.scaling.original_max_positions == 4096
    assert phi.attention_factor == pytest.approx(1.1902380714238083)  # sqrt(1 + log 32 / log 4096)


def test_windows_are_read() -> None:
    assert set(read("Mistral-7B-v0.1").windows) == {4096}
    assert set(read("Mistral-7B-Instruct-v0.3").windows) == {None}
    assert read("gemma-2-2b").windows == (4096, None) * 13
    assert read("gemma-3-1b").windows == ((512,) * 5 + (None,)) * 4 + (512, 512)
    assert set(read("Qwen3-0.6B").windows) == {None}
    phi = read("Phi-3-mini-128k-instruct")
    assert [group.kind for group in model_spec(phi, dtype="bfloat16").groups] == ["full"]


def test_both_ropes_of_gemma_3_are_read() -> None:
    config = read("gemma-3-1b")
    assert config.local_rope == Rope(theta=1e4, rotary_size=256)
    assert config.layer_rope(0) == config.local_rope
    assert config.layer_rope(5) == config.rope


def test_gemmas_are_tied_though_their_configs_do_not_say() -> None:
    assert read("gemma-2-2b").tied_embeddings
    assert read("gemma-3-1b").tied_embeddings
    assert not read("Mistral-7B-Instruct-v0.3").tied_embeddings


def test_end_of_text_may_be_several_ids() -> None:
    assert read("Llama-3.2-1B").eos_ids == (128001, 128008, 128009)
