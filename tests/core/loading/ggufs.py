"""Small .gguf files, written by the gguf package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD = 64, 4, 2, 16, 96
TOKENS = ["<|end|>", "<|turn|>", *map(chr, range(33, 127)), "Ġ", "Ġa", "ab", "Ġab"]
MERGES = ["Ġ a", "a b", "Ġ ab"]


def llama_keys(**changed: object) -> dict[str, object]:
    """Metadata of a one-layer Llama; None leaves a key out."""
    keys: dict[str, object] = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
    }
    keys |= {name.replace("__", "."): value for name, value in changed.items()}
    return {name: value for name, value in keys.items() if value is not None}


def llama_tensors(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Weights of that Llama by their GGUF names."""
    shapes = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FEED_FORWARD),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    keys: Mapping[str, object],
    tensors: Mapping[str, NDArray[np.float32]],
    kinds: Mapping[str, GGMLQuantizationType] | None = None,
) -> Path:
    """A file with these keys and tensors; `kinds` names those that are not stored as float32."""
    writer = gguf.GGUFWriter(path, str(keys["general.architecture"]))
    for key, value in keys.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, values in tensors.items():
        kind = (kinds or {}).get(name, GGMLQuantizationType.F32)
        if kind == GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case Sequence():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"{key}: {value!r}")


def tiny_llama(path: Path, **changed: object) -> Path:
    """A whole one-layer Llama."""
    return write_gguf(path, llama_keys(**changed), llama_tensors(np.random.default_rng(0)))
