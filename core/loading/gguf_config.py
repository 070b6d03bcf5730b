"""config.json and generation_config.json from a GGUF file's metadata, in Transformers' words.

What a file leaves out because llama.cpp has it in code (Gemma's scales and window patterns) is filled in here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

from gguf.constants import GGMLQuantizationType

from ..errors import ModelFormatError, UnsupportedArchitecture
from .gguf_file import GgufFile
from .gguf_names import family_of

Json = Mapping[str, object]

_MAX_SIZE = 1 << 24
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192
"""Every Llama 3.x checkpoint uses these; the file holds only the factors that follow from them."""
_GEMMA3_LOCAL_THETA = 10000.0
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|eom_id|>")


def model_config(file: GgufFile) -> Json:
    """config.json; raises ModelFormatError or UnsupportedArchitecture."""
    family = family_of(file)
    keys = _Keys(file)
    num_heads = keys.size("attention.head_count")
    hidden_size = keys.size("embedding_length")
    head_dim = keys.size("attention.key_length", hidden_size // num_heads or 1)
    config: dict[str, object] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": keys.size("vocab_size", len(file.strings("tokenizer.ggml.tokens"))),
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": family.hidden_act,
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number(
            "rope.freq_base", 1e6 if family.model_type == "gemma3_text" else 1e4
        ),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    rotary = keys.size("rope.dimension_count", head_dim)
    if rotary != head_dim and family.model_type != "phi3":
        raise UnsupportedArchitecture(
            f"{file.path}: {rotary} of {head_dim} dimensions of a head are rotated, "
            f"which is not built for {family.model_type}."
        )
    scaling = _rope_scaling(keys, head_dim)
    if scaling is not None:
        config["rope_scaling"] = scaling
    config.update(_family_keys(keys, family.model_type, head_dim, rotary))
    ids = {name: _token_id(file, key) for name, key in _SPECIAL_IDS.items()}
    return config | {name: value for name, value in ids.items() if value is not None}


def generation_config(file: GgufFile) -> Json:
    """generation_config.json: eos_token_id lists every token that ends an answer."""
    tokens = file.strings("tokenizer.ggml.tokens")
    template = file.text("tokenizer.chat_template", "")
    ids = [_token_id(file, f"{name}_token_id") for name in ("eos", "eot", "eom")]
    written = {text for text in _TURN_ENDS if text in template}
    ids += [number for number, token in enumerate(tokens) if token in written]
    config: dict[str, object] = {"eos_token_id": sorted({item for item in ids if item is not None})}
    bos = _token_id(file, "bos_token_id")
    return config if bos is None else config | {"bos_token_id": bos}


_SPECIAL_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}


def _token_id(file: GgufFile, key: str) -> int | None:
    """An id of the vocabulary, or None where the file names none."""
    full = f"tokenizer.ggml.{key}"
    if full not in file.metadata:
        return None
    value = file.integer(full)
    size = len(file.strings("tokenizer.ggml.tokens"))
    if not 0 <= value < size:
        raise ModelFormatError(f"{file.path}: {full} is {value}, the vocabulary has {size} tokens.")
    return value


class _Keys:
    """The keys of the file's own architecture."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self._prefix = file.text("general.architecture")

    def size(self, key: str, default: int | None = None) -> int:
        value = self.file.integer(f"{self._prefix}.{key}", default)
        if not 0 < value <= _MAX_SIZE:
            raise ModelFormatError(f"{self.file.path}: {self._prefix}.{key} is {value}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return _shortest(self.file.number(f"{self._prefix}.{key}", default))

    def text(self, key: str, default: str) -> str:
        return self.file.text(f"{self._prefix}.{key}", default)

    def has(self, key: str) -> bool:
        return f"{self._prefix}.{key}" in self.file.metadata


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 instead of 9.999999747378752e-06."""
    try:
        packed = struct.pack("<f", value)
    except OverflowError:
        return value
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == packed:
            return short
    return value


def _family_keys(keys: _Keys, model_type: str, head_dim: int, rotary: int) -> Json:
    """What only this family's config has."""
    num_layers = keys.size("block_count")
    match model_type:
        case "mixtral":
            experts = {"num_local_experts": keys.size("expert_count")}
            return experts | {"num_experts_per_tok": keys.size("expert_used_count")}
        case "mistral":
            return {"sliding_window": keys.size("attention.sliding_window")}
        case "llama" | "qwen3":
            return {"attention_bias": "blk.0.attn_q.bias" in keys.file.tensors}
        case "phi3":
            window = (
                keys.size("attention.sliding_window")
                if keys.has("attention.sliding_window")
                else None
            )
            return {"partial_rotary_factor": rotary / head_dim, "sliding_window": window}
        case "gemma":
            return {"hidden_activation": "gelu_pytorch_tanh"}
        case "gemma2":
            return {
                "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": _gemma_scale(keys, head_dim, largest=46),
                "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
                "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
                "sliding_window": keys.size("attention.sliding_window", 4096),
                "layer_types": _layer_types(num_layers, full_every=2),
            }
        case "gemma3_text":
            return {
                "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": _gemma_scale(keys, head_dim, largest=62),
                "rope_local_base_freq": _GEMMA3_LOCAL_THETA,
                "sliding_window": keys.size("attention.sliding_window"),
                "sliding_window_pattern": 6,
                "layer_types": _layer_types(num_layers, full_every=6),
            }
        case _:
            return {}


def _gemma_scale(keys: _Keys, head_dim: int, *, largest: int) -> int:
    """The largest model of each Gemma, known by its number of layers, scales by another size than head_dim."""
    if keys.size("block_count") == largest:
        return keys.size("embedding_length") // keys.size("attention.head_count")
    return head_dim


def _layer_types(num_layers: int, *, full_every: int) -> list[str]:
    kinds = ("full_attention", "sliding_attention")
    return [kinds[(layer + 1) % full_every != 0] for layer in range(num_layers)]


def _rope_scaling(keys: _Keys, head_dim: int) -> Json | None:
    tensors = keys.file.tensors
    if "rope_freqs.weight" in tensors:
        return _llama3_scaling(keys, head_dim)
    if "rope_factors_long.weight" in tensors:
        return {
            "rope_type": "longrope",
            "long_factor": _floats(keys.file, "rope_factors_long.weight"),
            "short_factor": _floats(keys.file, "rope_factors_short.weight"),
            "original_max_position_embeddings": keys.size("rope.scaling.original_context_length"),
        }
    kind = keys.text("rope.scaling.type", "linear" if keys.has("rope.scaling.factor") else "none")
    match kind:
        case "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
        case "yarn":
            return {
                "rope_type": "yarn",
                "factor": keys.number("rope.scaling.factor"),
                "original_max_position_embeddings": keys.size(
                    "rope.scaling.original_context_length"
                ),
            }
        case _:
            raise UnsupportedArchitecture(f"{keys.file.path}: rope scaling {kind!r} is not built.")


def _llama3_scaling(keys: _Keys, head_dim: int) -> Json:
    """Llama 3's parameters from its table of factors, checked by computing the table again."""
    factors = _floats(keys.file, "rope_freqs.weight")
    theta = keys.number("rope.freq_base", 1e4)
    factor = _shortest(max(factors))
    expected = [
        _llama3_factor(2 * math.pi * theta ** (2 * pair / head_dim), factor)
        for pair in range(head_dim // 2)
    ]
    close = [math.isclose(a, b, rel_tol=1e-3) for a, b in zip(factors, expected, strict=False)]
    if len(factors) != len(expected) or not all(close):
        raise UnsupportedArchitecture(
            f"{keys.file.path}: rope_freqs.weight is not the table of a Llama 3 model."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }


def _llama3_factor(wavelength: float, factor: float) -> float:
    """How much slower a pair of this wavelength turns (Llama 3.1's rule)."""
    if wavelength < _LLAMA3_CONTEXT / _LLAMA3_HIGH:
        return 1.0
    if wavelength > _LLAMA3_CONTEXT / _LLAMA3_LOW:
        return factor
    smooth = (_LLAMA3_CONTEXT / wavelength - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    return 1 / ((1 - smooth) / factor + smooth)


def _floats(file: GgufFile, name: str) -> list[float]:
    """A small float32 tensor; ModelFormatError if it is absent or of another type."""
    tensor = file.tensors.get(name)
    if tensor is None or tensor.kind != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        raise ModelFormatError(f"{file.path}: {name} is absent or no list of float32 numbers.")
    with file.path.open("rb") as data:
        data.seek(tensor.offset)
        values = struct.unpack(f"<{tensor.shape[0]}f", data.read(tensor.num_bytes))
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ModelFormatError(f"{file.path}: {name} holds numbers that are no factors.")
    return [_shortest(value) for value in values]
