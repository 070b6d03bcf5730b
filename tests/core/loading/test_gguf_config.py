from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from chipset.core.errors import ModelFormatError, UnsupportedArchitecture
from chipset.core.loading.gguf_config import generation_config, model_config
from chipset.core.loading.gguf_file import read_gguf

from .ggufs import HEAD_DIM, TOKENS, llama_keys, llama_tensors, tiny_llama, write_gguf

NORM = {"output_norm.weight": np.ones(8, dtype=np.float32)}


def _config(path: Path, **changed: object) -> Mapping[str, object]:
    return model_config(read_gguf(tiny_llama(path / "model.gguf", **changed)))


def _other(path: Path, architecture: str, **changed: object) -> Mapping[str, object]:
    """The same numbers under another architecture's keys."""
    keys = {
        name.replace("llama.", f"{architecture}.", 1): value for name, value in llama_keys().items()
    }
    keys["general.architecture"] = architecture
    keys |= {f"{architecture}.{name.replace('__', '.')}": value for name, value in changed.items()}
    return model_config(read_gguf(write_gguf(path / "model.gguf", keys, NORM)))


def test_says_what_a_llama_is(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] == 64
    assert config["head_dim"] == HEAD_DIM
    assert config["num_key_value_heads"] == 2
    assert config["vocab_size"] == len(TOKENS)
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 0
    assert "rope_scaling" not in config


def test_an_output_tensor_unties_the_embeddings(tmp_path: Path) -> None:
    tensors = llama_tensors(np.random.default_rng(0))
    tensors["output.weight"] = tensors["token_embd.weight"]
    path = write_gguf(tmp_path / "model.gguf", llama_keys(), tensors)
    assert model_config(read_gguf(path))["tie_word_embeddings"] is False


def test_a_llama_with_experts_is_a_mixtral(tmp_path: Path) -> None:
    config = _config(tmp_path, llama__expert_count=8, llama__expert_used_count=2)
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["num_local_experts"] == 8
    assert config["num_experts_per_tok"] == 2


def test_a_llama_with_a_window_is_a_mistral(tmp_path: Path) -> None:
    config = _config(tmp_path, llama__attention__sliding_window=32)
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 32


def test_gemma_3_brings_its_own_scales_and_windows(tmp_path: Path) -> None:
    config = _other(
        tmp_path, "gemma3", attention__sliding_window=16, attention__key_length=32, block_count=7
    )
    assert config["model_type"] == "gemma3_text"
    assert config["query_pre_attn_scalar"] == 32
    assert config["rope_local_base_freq"] == 10000.0
    sliding, full = "sliding_attention", "full_attention"
    assert config["layer_types"] == [sliding] * 5 + [full, sliding]


def test_gemma_2_alternates_and_caps(tmp_path: Path) -> None:
    config = _other(tmp_path, "gemma2", block_count=3, attn_logit_softcapping=40.0)
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config["attn_logit_softcapping"] == 40.0
    assert config["final_logit_softcapping"] == 30.0


def test_linear_and_yarn_scaling(tmp_path: Path) -> None:
    linear = _config(
        tmp_path, llama__rope__scaling__factor=4.0, llama__rope__scaling__type="linear"
    )
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = _config(
        tmp_path,
        llama__rope__scaling__factor=4.0,
        llama__rope__scaling__type="yarn",
        llama__rope__scaling__original_context_length=32,
    )
    assert yarn["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    with pytest.raises(UnsupportedArchitecture, match="'spiral'"):
        _config(tmp_path, llama__rope__scaling__type="spiral")


def _llama3_table(factor: float) -> np.ndarray:
    """As llama.cpp's converter makes it."""
    table = []
    for pair in range(HEAD_DIM // 2):
        wavelength = 2 * math.pi * 500000.0 ** (2 * pair / HEAD_DIM)
        if wavelength < 8192 / 4:
            table.append(1.0)
        elif wavelength > 8192:
            table.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            table.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(table, dtype=np.float32)


def test_recognises_llama_3_by_its_table(tmp_path: Path) -> None:
    keys = llama_keys(llama__rope__freq_base=500000.0)
    path = write_gguf(tmp_path / "a.gguf", keys, NORM | {"rope_freqs.weight": _llama3_table(32.0)})
    assert model_config(read_gguf(path))["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    other = write_gguf(
        tmp_path / "b.gguf", keys, NORM | {"rope_freqs.weight": _llama3_table(32.0)[::-1].copy()}
    )
    with pytest.raises(UnsupportedArchitecture, match="not the table of a Llama 3"):
        model_config(read_gguf(other))


def test_phi_3_brings_its_long_factors(tmp_path: Path) -> None:
    keys = {name.replace("llama.", "phi3.", 1): value for name, value in llama_keys().items()}
    keys |= {
        "general.architecture": "phi3",
        "phi3.rope.dimension_count": HEAD_DIM // 2,
        "phi3.rope.scaling.original_context_length": 64,
        "phi3.attention.sliding_window": 48,
    }
    factors = {
        f"rope_factors_{kind}.weight": np.array(values, dtype=np.float32)
        for kind, values in (("long", [1.5, 2.25]), ("short", [1.0, 1.1]))
    }
    config = model_config(read_gguf(write_gguf(tmp_path / "a.gguf", keys, NORM | factors)))
    assert config["partial_rotary_factor"] == 0.5
    assert config["sliding_window"] == 48
    assert config["rope_scaling"] == {
        "rope_type": "longrope",
        "long_factor": [1.5, 2.25],
        "short_factor": [1.0, 1.1],
        "original_max_position_embeddings": 64,
    }


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"llama__attention__head_count": 0}, "head_count is 0"),
        ({"llama__block_count": None}, "block_count is absent"),
        ({"llama__embedding_length": 1 << 30}, "embedding_length is"),
        ({"llama__embedding_length": "64"}, "where a whole number belongs"),
        ({"tokenizer__ggml__eos_token_id": 5000}, "the vocabulary has"),
    ],
)
def test_refuses_numbers_that_cannot_be(
    tmp_path: Path, changed: dict[str, object], reason: str
) -> None:
    with pytest.raises(ModelFormatError, match=reason):
        _config(tmp_path, **changed)


def test_names_an_unknown_architecture_and_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"'mamba'.*gemma3, llama"):
        _other(tmp_path, "mamba")


def test_every_turn_end_that_the_template_writes_ends_an_answer(tmp_path: Path) -> None:
    plain = tiny_llama(tmp_path / "plain.gguf")
    assert generation_config(read_gguf(plain))["eos_token_id"] == [0]
    chat = tiny_llama(
        tmp_path / "chat.gguf",
        tokenizer__ggml__eos_token_id=1,
        tokenizer__chat_template="{{ messages[0].content }}<|end|>",
    )
    assert generation_config(read_gguf(chat))["eos_token_id"] == [0, 1]


def test_types_of_the_tensors_do_not_matter_to_the_config(tmp_path: Path) -> None:
    tensors = llama_tensors(np.random.default_rng(0))
    kinds = {"token_embd.weight": GGMLQuantizationType.Q8_0}
    path = write_gguf(tmp_path / "model.gguf", llama_keys(), tensors, kinds)
    assert model_config(read_gguf(path)) == _config(tmp_path)
