"""A row per architecture: how its config.json sets the decoder's flags, and what its tensors are called.

Keys that name code (auto_map and its like) are never looked at. What is not served is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ..errors import UnsupportedArchitecture
from ..layers.rope import Rope
from . import names
from .config import ModelConfig
from .family import (
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_LAYERS,
    MAX_VOCAB,
    Family,
    equal_windows,
    layer_windows,
    read_base,
    read_one_rope,
    read_soft_cap,
    read_window,
)
from .fields import Fields
from .rope import MAX_POSITIONS, read_rope, rope_kind

MAX_EXPERTS: Final = 2**9

NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = MappingProxyType(
    {
        "compression_config": (),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "use_bidirectional_attention": (False,),
    }
)


def load_config(path: Path) -> ModelConfig:
    """Of a config.json. Raises ModelFormatError or UnsupportedArchitecture."""
    return read_config(Fields.load(path))


def read_config(fields: Fields) -> ModelConfig:
    """Raises ModelFormatError or UnsupportedArchitecture."""
    listed = fields.texts("architectures")
    if not listed:
        raise fields.wrong("architectures", "a list with the name of one")
    family = FAMILIES.get(listed[0])
    if family is None:
        raise UnsupportedArchitecture(
            f"{fields.source}: architecture {listed[0]} is not served; choose a model that is one of "
            + ", ".join(FAMILIES)
        )
    for key, values in {**NEUTRAL, **family.neutral}.items():
        if fields.has(key) and fields.value(key) not in values:
            raise UnsupportedArchitecture(
                f"{fields.source}: {key} is set, and for {listed[0]} that is not served; choose a checkpoint without it"
            )
    return family.read(fields, family)


def _read_llama(fields: Fields, family: Family) -> ModelConfig:
    base = read_base(fields, family)
    return replace(
        base,
        rope=read_one_rope(fields, family, base),
        windows=equal_windows(fields, base.num_layers, None),
        mlp_bias=fields.boolean("mlp_bias", default=False),
    )


def _read_mistral(fields: Fields, family: Family) -> ModelConfig:
    base = read_base(fields, family)
    window = read_window(fields, default=4096)
    return replace(
        base,
        rope=read_one_rope(fields, family, base),
        windows=equal_windows(fields, base.num_layers, window),
    )


def _read_mixtral(fields: Fields, family: Family) -> ModelConfig:
    base = read_base(fields, family)
    experts = fields.integer(
        fields.first("num_local_experts", "num_experts"), high=MAX_EXPERTS, default=8
    )
    return replace(
        base,
        rope=read_one_rope(fields, family, base),
        windows=equal_windows(fields, base.num_layers, read_window(fields)),
        num_experts=experts,
        experts_per_token=fields.integer("num_experts_per_tok", high=experts, default=2),
    )


def _read_qwen3(fields: Fields, family: Family) -> ModelConfig:
    base = read_base(fields, family)
    slides = fields.boolean("use_sliding_window", default=False)
    window = read_window(fields, default=4096) if slides else None
    first = fields.integer("max_window_layers", low=0, high=2**12, default=28)
    return replace(
        base,
        rope=read_one_rope(fields, family, base),
        windows=layer_windows(
            fields, base.num_layers, window, lambda layer: window is not None and layer >= first
        ),
        qk_norm=True,
    )


def _read_phi3(fields: Fields, family: Family) -> ModelConfig:
    base = read_base(fields, family)
    key = fields.first("rope_scaling", "rope_parameters")
    parameters = fields.section(key) or Fields({}, fields.source)
    if rope_kind(parameters) == "yarn":  # an old name of longrope in this family
        fields = fields.replaced(**{key: parameters.values(rope_type="longrope")})
    elif rope_kind(parameters) not in ("default", "longrope", "su"):
        raise UnsupportedArchitecture(
            f"{parameters.source}: rope type {rope_kind(parameters)!r} is not served for this architecture; "
            "served are default and longrope; choose another model"
        )
    return replace(
        base,
        rope=read_one_rope(fields, family, base, original_positions=4096),
        windows=equal_windows(fields, base.num_layers, read_window(fields)),
    )


def _gemma(fields: Fields, family: Family) -> ModelConfig:
    """What Gemma 2 and 3 share."""
    base = read_base(fields, family)
    return replace(
        base,
        norm_offset=1.0,
        norm_weight_in_float=True,
        norm_placement="sandwich",
        embedding_multiplier=base.hidden_size**0.5,
        attention_scale=fields.number("query_pre_attn_scalar", default=256.0) ** -0.5,
    )


def _read_gemma2(fields: Fields, family: Family) -> ModelConfig:
    base = _gemma(fields, family)
    window = read_window(fields, default=4096)
    return replace(
        base,
        rope=read_one_rope(fields, family, base),
        windows=layer_windows(fields, base.num_layers, window, lambda layer: layer % 2 == 0),
        attention_soft_cap=read_soft_cap(fields, "attn_logit_softcapping", 50.0),
        logit_soft_cap=read_soft_cap(fields, "final_logit_softcapping", 30.0),
    )


def _read_gemma3(fields: Fields, family: Family) -> ModelConfig:
    base = _gemma(fields, family)
    window = read_window(fields, default=4096)
    pattern = fields.integer("sliding_window_pattern", high=2**12, default=6)
    rope, local_rope = _gemma3_ropes(fields, family, base)
    return replace(
        base,
        rope=rope,
        local_rope=local_rope,
        windows=layer_windows(fields, base.num_layers, window, lambda i: (i + 1) % pattern != 0),
        logit_soft_cap=read_soft_cap(fields, "final_logit_softcapping", None),
        qk_norm=True,
    )


def _gemma3_ropes(fields: Fields, family: Family, base: ModelConfig) -> tuple[Rope, Rope]:
    """Of the full and of the sliding layers; rope_scaling, of older configs, is of the full ones alone."""
    by_kind = fields.section("rope_parameters") or Fields({}, fields.source)
    kinds = ("full_attention", "sliding_attention")
    if not set(by_kind.keys()) <= set(kinds):
        raise fields.wrong("rope_parameters", f"an object with the keys {' and '.join(kinds)}")
    parameters = (
        by_kind.section(kinds[0]) or fields.section("rope_scaling"),
        by_kind.section(kinds[1]),
    )
    thetas = (
        fields.number("rope_theta", default=family.rope_theta),
        fields.number("rope_local_base_freq", default=10_000.0),
    )
    rope, local_rope = (
        read_rope(
            fields,
            of_kind,
            head_size=base.head_size,
            max_positions=base.max_positions,
            theta=theta,
        )
        for of_kind, theta in zip(parameters, thetas, strict=True)
    )
    return rope, local_rope


def _read_bloom(fields: Fields, family: Family) -> ModelConfig:
    hidden = fields.integer(fields.first("hidden_size", "n_embed"), high=MAX_HIDDEN)
    heads = fields.integer(fields.first("n_head", "num_attention_heads"), high=MAX_HEADS)
    layers = fields.integer(fields.first("n_layer", "num_hidden_layers"), high=MAX_LAYERS)
    vocab = fields.integer("vocab_size", high=MAX_VOCAB)
    if hidden % heads:
        raise fields.wrong("hidden_size", f"a multiple of the number of heads, {heads}")
    if fields.integer("n_inner", high=2**22, default=4 * hidden) != 4 * hidden:
        raise fields.wrong("n_inner", f"four times the hidden size, {4 * hidden}, or null")
    return ModelConfig(
        architecture=fields.texts("architectures")[0],
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden // heads,
        intermediate_size=4 * hidden,
        # nothing in the model ends there: ALiBi was trained on this length and reaches further
        max_positions=fields.integer("seq_length", high=MAX_POSITIONS, default=2048),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", default=family.norm_eps),
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tied_embeddings=fields.boolean("tie_word_embeddings", default=family.tied_embeddings),
        embedding_norm=True,
        alibi=True,
        windows=(None,) * layers,
        attention_scale=(hidden // heads) ** -0.5,
        bos_id=next(iter(fields.ids("bos_token_id", vocab_size=vocab)), None),
        eos_ids=fields.ids("eos_token_id", vocab_size=vocab),
    )


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(read=_read_llama, names=names.LLAMA),
        "MistralForCausalLM": Family(
            read=_read_mistral, names=names.LLAMA, neutral={"attention_bias": (False,)}
        ),
        "MixtralForCausalLM": Family(
            read=_read_mixtral,
            names=names.MIXTRAL,
            rope_theta=1e6,
            norm_eps=1e-5,
            neutral={"attention_bias": (False,)},
        ),
        "Gemma2ForCausalLM": Family(
            read=_read_gemma2,
            names=names.GEMMA,
            tied_embeddings=True,
            head_size=256,
            activation_key="hidden_activation",
            activation="gelu_pytorch_tanh",
        ),
        "Gemma3ForCausalLM": Family(
            read=_read_gemma3,
            names=names.GEMMA,
            rope_theta=1e6,
            tied_embeddings=True,
            head_size=256,
            activation_key="hidden_activation",
            activation="gelu_pytorch_tanh",
            neutral={"attn_logit_softcapping": ()},
        ),
        "Qwen3ForCausalLM": Family(read=_read_qwen3, names=names.LLAMA, head_size=128),
        "Phi3ForCausalLM": Family(
            read=_read_phi3,
            names=names.PHI3,
            norm_eps=1e-5,
            partial_rotary=True,
            neutral={"attention_bias": (False,)},
        ),
        "BloomForCausalLM": Family(
            read=_read_bloom,
            names=names.BLOOM,
            norm_eps=1e-5,
            tied_embeddings=True,
            neutral={"apply_residual_connection_post_layernorm": (False,)},
        ),
    }
)
