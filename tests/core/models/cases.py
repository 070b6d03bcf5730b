"""The architectures whose logits are compared, and the faults that the comparison must catch.

`scripts/docs` makes docs/models.md of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from chipset.core.layers.rope import Rope
from chipset.core.models.config import ModelConfig

Stream = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A mistake in how we read a config or a checkpoint."""

    name: str
    config: Callable[[ModelConfig], ModelConfig] = lambda config: config
    weights: Callable[[Stream], Stream] = lambda stream: stream


@dataclass(frozen=True, kw_only=True)
class Case:
    """One architecture with one set of flags."""

    name: str
    architecture: str
    mechanism: str
    settings: Mapping[str, object]
    faults: tuple[Fault, ...]


def flags(name: str, **values: Any) -> Fault:
    """A fault that sets some flags."""
    return Fault(name=name, config=lambda config: replace(config, **values))


def scaled(name: str, flag: str, factor: float) -> Fault:
    """A fault that multiplies a flag."""
    return Fault(
        name=name, config=lambda config: replace(config, **{flag: getattr(config, flag) * factor})
    )


def rope(name: str, change: Callable[[Rope], Rope | None], flag: str = "rope") -> Fault:
    """A fault in a rope."""
    return Fault(
        name=name, config=lambda config: replace(config, **{flag: change(getattr(config, flag))})
    )


def scaling(name: str, **values: Any) -> Fault:
    """A fault in the scaling of the rope."""
    return rope(name, lambda r: replace(r, scaling=replace(r.scaling, **values)))  # type: ignore[type-var]


def window(name: str, change: Callable[[tuple[int | None, ...]], tuple[int | None, ...]]) -> Fault:
    """A fault in the windows of the layers."""
    return Fault(name=name, config=lambda config: replace(config, windows=change(config.windows)))


def swapped(name: str, one: str, other: str) -> Fault:
    """A fault that takes one tensor of each layer for another."""

    def swap(stream: Stream) -> Stream:
        for key, tensor in stream:
            if one in key:
                yield key.replace(one, other), tensor
            elif other in key:
                yield key.replace(other, one), tensor
            else:
                yield key, tensor

    return Fault(name=name, weights=swap)


def longer(by: int) -> Callable[[tuple[int | None, ...]], tuple[int | None, ...]]:
    """Windows longer by some tokens."""
    return lambda windows: tuple(None if w is None else w + by for w in windows)


TINY: Mapping[str, object] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

WINDOW_FAULTS = (
    window("window + 1", longer(1)),
    window("window - 1", longer(-1)),
    window("no window", lambda windows: (None,) * len(windows)),
)
NO_WINDOW_FAULT = window("window", lambda windows: (13,) * len(windows))
MIXED_WINDOW_FAULTS = (
    *WINDOW_FAULTS,
    window("window on all layers", lambda windows: (max(w or 0 for w in windows),) * len(windows)),
    window("window on the wrong layers", lambda windows: windows[1:] + windows[:1]),
)
ROPE_FAULTS = (
    flags("no rope", rope=None, local_rope=None),
    rope("rope theta", lambda r: replace(r, theta=r.theta * 1.5)),
)
COMMON_FAULTS = (
    scaled("norm eps", "norm_eps", 0.1),
    scaled("attention scale", "attention_scale", 1.1),
    flags("activation", activation="relu"),
)
SANDWICH_FAULTS = (
    flags("norm placement: pre", norm_placement="pre"),
    swapped("norm order: around attention", ".input_layernorm.", ".post_attention_layernorm."),
    swapped("norm order: around MLP", ".pre_feedforward_", ".post_feedforward_"),
    flags("norm offset", norm_offset=0.0),
)
PRE_FAULTS = (
    *COMMON_FAULTS,
    swapped("norm order", ".input_layernorm.", ".post_attention_layernorm."),
)
QK_NORM_FAULTS = (
    flags("no qk-norm", qk_norm=False),
    swapped("qk-norm: q for k", ".q_norm.", ".k_norm."),
)

CASES = (
    Case(
        name="llama",
        architecture="LlamaForCausalLM",
        mechanism="grouped-query attention, RoPE, RMSNorm, gated MLP, tied embeddings",
        settings={**TINY, "tie_word_embeddings": True},
        faults=(
            *PRE_FAULTS,
            *ROPE_FAULTS,
            NO_WINDOW_FAULT,
            rope("partial rotary", lambda r: replace(r, rotary_size=r.rotary_size // 2)),
            Fault(
                name="heads of half the size",
                config=lambda config: replace(
                    config,
                    num_heads=8,
                    num_kv_heads=4,
                    head_size=4,
                    rope=Rope(theta=10_000.0, rotary_size=4),
                ),
            ),
        ),
    ),
    Case(
        name="llama-3",
        architecture="LlamaForCausalLM",
        mechanism="llama3 rope scaling, biases, separate head",
        settings={
            **TINY,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_theta": 500.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        faults=(
            flags("tied embeddings", tied_embeddings=True),
            flags("no qkv bias", qkv_bias=False),
            flags("no o bias", o_bias=False),
            flags("no MLP bias", mlp_bias=False),
            rope("rope scaling", lambda r: replace(r, scaling=None)),
            scaling("rope factor", factor=4.0),
            scaling("rope low frequencies", low_freq_factor=1.5),
            scaling("rope high frequencies", high_freq_factor=3.0),
            scaling("rope original length", original_max_positions=64),
        ),
    ),
    Case(
        name="llama-linear",
        architecture="LlamaForCausalLM",
        mechanism="linear rope scaling",
        settings={**TINY, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        faults=(
            rope("rope scaling", lambda r: replace(r, scaling=None)),
            scaling("rope factor", factor=3.0),
        ),
    ),
    Case(
        name="mistral",
        architecture="MistralForCausalLM",
        mechanism="sliding window on every layer, separate head size",
        settings={**TINY, "sliding_window": 13, "head_dim": 16},
        faults=(*PRE_FAULTS, *ROPE_FAULTS, *WINDOW_FAULTS),
    ),
    Case(
        name="gemma-2",
        architecture="Gemma2ForCausalLM",
        mechanism="both soft caps, sandwich norms with offset, windows on every other layer, embedding multiplier, "
        "query scale",
        settings={
            **TINY,
            "head_dim": 16,
            "sliding_window": 13,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 7.0,
        },
        faults=(
            *COMMON_FAULTS,
            *ROPE_FAULTS,
            *SANDWICH_FAULTS,
            *MIXED_WINDOW_FAULTS,
            flags("no attention soft cap", attention_soft_cap=None),
            scaled("attention soft cap", "attention_soft_cap", 1.1),
            flags("no logit soft cap", logit_soft_cap=None),
            scaled("logit soft cap", "logit_soft_cap", 1.1),
            flags("no embedding multiplier", embedding_multiplier=1.0),
            flags("attention scale of the head size", attention_scale=16**-0.5),
        ),
    ),
    Case(
        name="gemma-3",
        architecture="Gemma3ForCausalLM",
        mechanism="two ropes (a scaled global and a local one), qk-norm, sandwich norms, mixed windows",
        settings={
            **TINY,
            "head_dim": 16,
            "sliding_window": 13,
            "query_pre_attn_scalar": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        faults=(
            *COMMON_FAULTS,
            *ROPE_FAULTS,
            *SANDWICH_FAULTS,
            *MIXED_WINDOW_FAULTS,
            *QK_NORM_FAULTS,
            rope("rope scaling", lambda r: replace(r, scaling=None)),
            flags("no local rope", local_rope=None),
            rope("local rope theta", lambda r: replace(r, theta=r.theta * 1.5), "local_rope"),
            Fault(
                name="ropes taken for each other",
                config=lambda config: replace(
                    config, rope=config.local_rope, local_rope=config.rope
                ),
            ),
            flags("logit soft cap", logit_soft_cap=7.0),
            flags("no embedding multiplier", embedding_multiplier=1.0),
        ),
    ),
    Case(
        name="qwen-3",
        architecture="Qwen3ForCausalLM",
        mechanism="qk-norm, windows on the last layers",
        settings={
            **TINY,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 13,
            "max_window_layers": 2,
        },
        faults=(*PRE_FAULTS, *ROPE_FAULTS, *QK_NORM_FAULTS, *MIXED_WINDOW_FAULTS),
    ),
    Case(
        name="qwen-3-yarn",
        architecture="Qwen3ForCausalLM",
        mechanism="yarn rope scaling",
        settings={
            **TINY,
            "head_dim": 16,
            "rope_theta": 500.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 2.0,
                "original_max_position_embeddings": 32,
            },
        },
        faults=(
            rope("rope scaling", lambda r: replace(r, scaling=None)),
            rope("rope attention factor", lambda r: replace(r, attention_factor=1.0)),
            scaling("rope factor", factor=3.0),
            scaling("rope beta fast", beta_fast=32.0),
            scaling("rope beta slow", beta_slow=2.0),
            scaling("rope truncation", truncate=False),
            scaling("rope original length", original_max_positions=128),
        ),
    ),
    Case(
        name="phi-3",
        architecture="Phi3ForCausalLM",
        mechanism="partial rotary, longrope (long factors), qkv and gate_up fused in the checkpoint, a window",
        settings={
            **TINY,
            "hidden_size": 64,
            "sliding_window": 29,
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.5, 2.0, 3.0, 4.0],
            },
        },
        faults=(
            *PRE_FAULTS,
            *ROPE_FAULTS,
            *WINDOW_FAULTS,
            rope("rope scaling", lambda r: replace(r, scaling=None)),
            rope("rope attention factor", lambda r: replace(r, attention_factor=1.0)),
            scaling("longrope's short factors", long_factor=(1.0, 1.1, 1.2, 1.3)),
            scaling("rope original length", original_max_positions=128),
            rope(
                "all of the head rotated",
                lambda r: replace(
                    r,
                    rotary_size=2 * r.rotary_size,
                    scaling=replace(r.scaling, long_factor=(1.5, 2.0, 3.0, 4.0) * 2),  # type: ignore[type-var]
                ),
            ),
        ),
    ),
    Case(
        name="mixtral",
        architecture="MixtralForCausalLM",
        mechanism="routed experts",
        settings={**TINY, "num_local_experts": 5, "num_experts_per_tok": 2},
        faults=(
            *PRE_FAULTS,
            *ROPE_FAULTS,
            NO_WINDOW_FAULT,
            flags("one expert a token", experts_per_token=1),
            flags("three experts a token", experts_per_token=3),
            flags("weights of experts not normalised", normalise_experts=False),
            swapped("gate taken for up", ".w1.", ".w3."),
        ),
    ),
    Case(
        name="bloom",
        architecture="BloomForCausalLM",
        mechanism="ALiBi (heads no power of two), LayerNorm, embedding norm, plain MLP, qkv interleaved by head",
        settings={
            "vocab_size": 97,
            "hidden_size": 48,
            "n_layer": 3,
            "n_head": 6,
            "layer_norm_epsilon": 1e-2,
        },
        faults=(
            *COMMON_FAULTS,
            swapped("norm order", ".input_layernorm.", ".post_attention_layernorm."),
            NO_WINDOW_FAULT,
            flags("no ALiBi", alibi=False),
            flags("no embedding norm", embedding_norm=False),
            flags("RMSNorm", norm="rms"),
            flags("exact gelu", activation="gelu"),
            flags("no qkv bias", qkv_bias=False),
            flags("no o bias", o_bias=False),
            flags("no MLP bias", mlp_bias=False),
        ),
    ),
)
