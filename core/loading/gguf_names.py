"""What each GGUF architecture is called in Transformers' naming, and how its tensors got there.

llama.cpp's converter renames tensors and changes three things, which reading has to undo: Llama's q and k rows are
interleaved for its rotary kernel, Gemma's norm weights are stored plus one, and experts are stacked in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..errors import ModelFormatError, UnsupportedArchitecture
from .gguf_file import GgufFile, GgufTensor

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_MIXTRAL = {"ffn_gate_inp": "block_sparse_moe.gate"}
_MIXTRAL_EXPERTS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}
_ROPE_TENSORS = frozenset(
    {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFamily:
    """One GGUF architecture in Transformers' words."""

    architecture: str
    """Class name in config.json."""
    model_type: str
    hidden_act: str = "silu"
    layer_names: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    """GGUF stem after blk.N. -> stem after model.layers.N."""
    rotary_rows_interleaved: bool = False
    """The rows of q and k alternate between the two halves of a head."""
    norms_plus_one: bool = False
    """Norm weights are stored as 1 + w."""


_GELU = "gelu_pytorch_tanh"
_LLAMA = GgufFamily(
    architecture="LlamaForCausalLM", model_type="llama", rotary_rows_interleaved=True
)
_FAMILIES = {
    "llama": _LLAMA,
    "qwen2": GgufFamily(architecture="Qwen2ForCausalLM", model_type="qwen2"),
    "qwen3": GgufFamily(
        architecture="Qwen3ForCausalLM", model_type="qwen3", layer_names=_LAYER | _QK_NORM
    ),
    "gemma": GgufFamily(
        architecture="GemmaForCausalLM",
        model_type="gemma",
        hidden_act=_GELU,
        norms_plus_one=True,
    ),
    "gemma2": GgufFamily(
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        hidden_act=_GELU,
        layer_names=_LAYER | _SANDWICH,
        norms_plus_one=True,
    ),
    "gemma3": GgufFamily(
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        hidden_act=_GELU,
        layer_names=_LAYER | _SANDWICH | _QK_NORM,
        norms_plus_one=True,
    ),
    "phi3": GgufFamily(
        architecture="Phi3ForCausalLM", model_type="phi3", layer_names=_LAYER | _FUSED
    ),
}


@dataclass(frozen=True, slots=True)
class WeightPart:
    """One tensor by Transformers' name: stored bytes, and what to undo once they are decoded."""

    name: str
    stored: GgufTensor
    interleaved_heads: int = 0
    """Above 0: undo the interleaving of rows within this many heads."""
    plus_one: bool = False
    """Subtract the one that was added."""


def family_of(file: GgufFile) -> GgufFamily:
    """Raises UnsupportedArchitecture if no row above fits."""
    name = file.text("general.architecture")
    if name not in _FAMILIES:
        raise UnsupportedArchitecture(
            f"{file.path} holds the architecture {name!r}. GGUF files can be served for: "
            f"{', '.join(sorted(_FAMILIES))}."
        )
    if name != "llama":
        return _FAMILIES[name]
    if file.integer("llama.expert_count", 0) > 0:
        layer_names = _LAYER | _MIXTRAL
        return replace(
            _LLAMA, architecture="MixtralForCausalLM", model_type="mixtral", layer_names=layer_names
        )
    if file.integer("llama.attention.sliding_window", 0) > 0:
        return replace(_LLAMA, architecture="MistralForCausalLM", model_type="mistral")
    return _LLAMA


def weight_parts(file: GgufFile) -> Iterator[WeightPart]:
    """Every tensor of the model, in the file's order; raises ModelFormatError for a name that does not belong."""
    family = family_of(file)
    prefix = file.text("general.architecture")
    num_heads = file.integer(f"{prefix}.attention.head_count")
    num_kv_heads = file.integer(f"{prefix}.attention.head_count_kv", num_heads)
    if num_heads < 1 or num_kv_heads < 1:
        raise ModelFormatError(f"{file.path} claims {num_heads} heads, {num_kv_heads} for KV.")
    heads = {"attn_q": num_heads, "attn_k": num_kv_heads}
    for tensor in file.tensors.values():
        if tensor.name in _ROPE_TENSORS:
            continue
        stem, _, leaf = tensor.name.rpartition(".")
        block, _, layer_stem = stem.removeprefix("blk.").partition(".")
        if leaf not in ("weight", "bias"):
            raise _misplaced(file, tensor)
        if stem in _TOP:
            plus_one = family.norms_plus_one and stem.endswith("norm")
            yield WeightPart(f"{_TOP[stem]}.{leaf}", tensor, plus_one=plus_one)
        elif not (stem.startswith("blk.") and block.isdecimal()):
            raise _misplaced(file, tensor)
        elif layer_stem in _MIXTRAL_EXPERTS and family.model_type == "mixtral":
            yield from _experts(file, tensor, f"model.layers.{int(block)}", layer_stem)
        elif layer_stem in family.layer_names:
            interleaved = heads.get(layer_stem, 0) if family.rotary_rows_interleaved else 0
            if interleaved and tensor.shape[0] % (2 * interleaved):
                raise ModelFormatError(
                    f"{file.path}: {tensor.name} has {tensor.shape[0]} rows for {interleaved} heads."
                )
            yield WeightPart(
                f"model.layers.{int(block)}.{family.layer_names[layer_stem]}.{leaf}",
                tensor,
                interleaved,
                family.norms_plus_one and layer_stem.endswith("norm"),
            )
        else:
            raise _misplaced(file, tensor)


def _experts(
    file: GgufFile, tensor: GgufTensor, layer: str, layer_stem: str
) -> Iterator[WeightPart]:
    """The slices of a tensor that stacks experts: [experts, rows, columns]."""
    if len(tensor.shape) != 3:
        raise ModelFormatError(f"{file.path}: {tensor.name} has the shape {tensor.shape}.")
    num_experts = tensor.shape[0]
    num_bytes = tensor.num_bytes // num_experts
    for expert in range(num_experts):
        offset = tensor.offset + expert * num_bytes
        part = GgufTensor(tensor.name, tensor.shape[1:], tensor.kind, offset, num_bytes)
        name = f"{layer}.block_sparse_moe.experts.{expert}.{_MIXTRAL_EXPERTS[layer_stem]}.weight"
        yield WeightPart(name, part)


def _misplaced(file: GgufFile, tensor: GgufTensor) -> ModelFormatError:
    architecture = file.text("general.architecture")
    return ModelFormatError(
        f"{file.path}: the tensor {tensor.name!r} has no place in the architecture {architecture!r}."
    )
