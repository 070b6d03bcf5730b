"""What the tensors of a checkpoint are called, per family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorNames:
    """Names without `.weight` and `.bias`, and without the optional `prefix`. Defaults are Llama's.

    Layer names follow `layer` and its number; "" where a family has no such tensor.
    """

    prefix: str = "model."
    """Of the base model; checkpoints come with and without it."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(in some checkpoints, here)"""
    embedding: str = "embed_tokens"
    embedding_norm: str = ""
    final_norm: str = "norm"
    head: str = "lm_head"
    layer: str = "layers."

    attention_norm: str = "input_layernorm"
    attention_post_norm: str = ""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three tensors, or one that is fused."""
    interleaved_qkv: bool = False
    """Fused head by head: q, k, v of head 0, then of head 1."""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"

    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str = ""
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Gate and up, one that is fused, or up alone where nothing is gated."""
    down: str = "mlp.down_proj"

    router: str = ""
    experts: str = ""
    """Of all: packed as EXPERTS.gate_up_proj and EXPERTS.down_proj, or as EXPERTS.N. and the next three."""
    expert_gate_up: tuple[str, str] = ("w1", "w3")
    expert_down: str = "w2"

    ignored: tuple[str, ...] = (".rotary_emb.", ".masked_bias")
    """Parts of names of tensors that are no weights, found in old checkpoints."""


LLAMA = TensorNames()

GEMMA = TensorNames(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)

PHI3 = TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))

MIXTRAL = TensorNames(
    renamed=((".block_sparse_moe.", ".mlp."),), router="mlp.gate", experts="mlp.experts"
)

BLOOM = TensorNames(
    prefix="transformer.",
    embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    final_norm="ln_f",
    layer="h.",
    qkv=("self_attention.query_key_value",),
    interleaved_qkv=True,
    o="self_attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
