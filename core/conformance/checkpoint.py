"""Tiny random checkpoints, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..files import ModelFiles
from ..models.families import load_config
from ..models.tensors import checkpoint_layout

VOCAB_SIZE = 384
NAN_TOKEN = VOCAB_SIZE - 1
"""Where asked for, its embedding is nan, and so is every logit after it."""
SIZES: Mapping[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
FULL: Mapping[str, object] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
"""Every layer sees the whole text."""
WINDOWED: Mapping[str, object] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "use_sliding_window": True,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention"],
}
"""One layer sees the last 40 tokens: two KV groups."""

MOE: Mapping[str, object] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
"""Two of four experts for each token."""
UNEVEN: Mapping[str, object] = {
    **FULL,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 100,
    "vocab_size": VOCAB_SIZE - 1,
}
"""Nothing divides by 2 or 4: 3 KV heads, 9 query heads, an inner size of 100, an odd vocabulary."""


def make_checkpoint(
    kind: Mapping[str, object], folder: Path, *, has_nan: bool = False, seed: int = 0
) -> ModelFiles:
    """Write config.json and random weights; there is no tokenizer, for an engine reads none."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    config.write_text(json.dumps({**SIZES, **kind}))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in checkpoint_layout(load_config(config)).tensors.items():
        is_norm = "norm" in name
        # large enough for texts that do not settle on one token
        noise = torch.randn(shape, generator=generator) * (0.2 if is_norm else 0.3)
        tensors[name] = noise + 1 if is_norm else noise
        if has_nan and "embed" in name:
            tensors[name][NAN_TOKEN] = float("nan")
    weights = folder / "model.safetensors"
    save_file(tensors, weights)
    return ModelFiles(
        source=str(folder),
        name=folder.name,
        revision=None,
        config=config,
        tokenizer=folder / "tokenizer.json",
        tokenizer_config=None,
        chat_template=None,
        generation_config=None,
        weights=(weights,),
    )
