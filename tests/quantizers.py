"""Writers of quantised checkpoints: float weights, rounded to the nearest, in the layouts that others publish.

Written from those layouts and in numpy, apart from the code that reads them. Each knows what its numbers are worth, so
that whoever reads a file can be compared with what was meant.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of eight outputs, the one whose nibble comes first, second, … in a word."""

GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
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


@dataclass(frozen=True, kw_only=True)
class Written:
    """One layer."""

    tensors: Mapping[str, Tensor]
    """By the last part of their names."""
    value: Tensor
    """f32 [N, K], what they are worth."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A way to store the layers of a model."""

    name: str
    config: Mapping[str, Any]
    """quantization_config."""
    layer: Callable[[Tensor, float], Written]
    """From a weight [N, K] and the largest of the layer's inputs."""


def to_words(numbers: Ints, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """[R, n] -> i32 [R, n * bits / 32]; `order`: which of a word's numbers comes first, second, …"""
    per_word = 32 // bits
    words = numbers.astype(np.uint64).reshape(len(numbers), -1, per_word)
    words = words[:, :, list(order or range(per_word))]
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    found = np.bitwise_or.reduce(words << shifts, axis=2).astype(np.uint32)
    return torch.from_numpy(np.ascontiguousarray(found).view(np.int32))


def round_groups(
    weight: Floats, bits: int, groups: Ints, symmetric: bool
) -> tuple[Ints, Floats, Ints]:
    """Numbers [N, K], f16 scales as f32 [N, G] and zero points [N, G], for the group [K] of each input."""
    num_groups, top = int(groups.max()) + 1, 2**bits - 1
    scales = np.zeros((len(weight), num_groups), np.float32)
    zeros = np.full((len(weight), num_groups), 2 ** (bits - 1), np.int64)
    for group in range(num_groups):
        part = weight[:, groups == group]
        if symmetric:
            extent = 2 * np.abs(part).max(1)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            extent = high - low
        scales[:, group] = np.maximum(extent / top, 1e-6).astype(np.float16)
        if not symmetric:
            zeros[:, group] = np.clip(np.round(-low / scales[:, group]), 0, top)
    numbers = np.round(weight / scales[:, groups]).astype(np.int64) + zeros[:, groups]
    return np.clip(numbers, 0, top), scales, zeros


def worth(numbers: Ints, scales: Floats, zeros: Ints, groups: Ints) -> Tensor:
    """scale * (number - zero)"""
    return torch.from_numpy(scales[:, groups] * (numbers - zeros[:, groups]).astype(np.float32))


def awq(weight: Tensor, group_size: int = 64) -> Written:
    """For GEMM kernels, 4 bits with zero points. -1: one group."""
    num_inputs = weight.shape[1]
    size = num_inputs if group_size == -1 else group_size
    groups = np.arange(num_inputs) // size
    numbers, scales, zeros = round_groups(weight.numpy(), 4, groups, symmetric=False)
    tensors = {
        "qweight": to_words(numbers.T, 4, AWQ_ORDER),
        "qzeros": to_words(zeros.T, 4, AWQ_ORDER),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)).half(),
    }
    return Written(tensors=tensors, value=worth(numbers, scales, zeros, groups))


def gptq(
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    order_seed: int | None = None,
    version: int = 1,
) -> Written:
    """`order_seed`: of desc_act's order; None: inputs stand in their own."""
    num_inputs = weight.shape[1]
    size = num_inputs if group_size == -1 else group_size
    order = np.arange(num_inputs)
    if order_seed is not None:
        order = np.random.default_rng(order_seed).permutation(num_inputs)
    groups = np.empty(num_inputs, np.int64)
    groups[order] = np.arange(num_inputs) // size
    numbers, scales, zeros = round_groups(weight.numpy(), bits, groups, symmetric)
    kept = zeros if version == 2 else (zeros - 1) % 2**bits
    tensors = {
        "qweight": to_words(numbers, bits).T.contiguous(),
        "qzeros": to_words(kept.T, bits),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)).half(),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return Written(tensors=tensors, value=worth(numbers, scales, zeros, groups))


def fp8(
    weight: Tensor,
    scales: str | tuple[int, int],
    *,
    largest_input: float | None = None,
    scale_name: str = "weight_scale",
) -> Written:
    """`scales`: of the "layer", each "row", or blocks. `largest_input`: where inputs are quantised by one scale."""
    num_rows, num_columns = weight.shape
    down, across = {"layer": weight.shape, "row": (1, num_columns)}.get(str(scales)) or scales
    grid = -(-num_rows // int(down)), -(-num_columns // int(across))
    full = torch.zeros(grid[0] * int(down), grid[1] * int(across))
    full[:num_rows, :num_columns] = weight
    largest = full.view(grid[0], int(down), grid[1], int(across)).abs().amax((1, 3))
    scale = (largest / 448).clamp(min=1e-12)
    each = scale.repeat_interleave(int(down), 0).repeat_interleave(int(across), 1)
    each = each[:num_rows, :num_columns]
    numbers = (weight / each).clamp(-448, 448).to(torch.float8_e4m3fn)
    tensors = {"weight": numbers, scale_name: scale[0, 0] if scales == "layer" else scale}
    if largest_input is not None:
        tensors["input_scale"] = torch.tensor(largest_input / 448)
    return Written(tensors=tensors, value=numbers.float() * each)


def awq_recipe(group_size: int) -> Recipe:
    config = {"bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    return Recipe(
        name=f"awq, groups of {group_size}",
        config={"quant_method": "awq", "modules_to_not_convert": None, **config},
        layer=lambda weight, largest: awq(weight, group_size),
    )


def gptq_recipe(
    group_size: int,
    *,
    bits: int = 4,
    symmetric: bool = True,
    desc_act: bool = False,
    version: int = 1,
) -> Recipe:
    words = [f"{bits} bits", "whole rows" if group_size == -1 else f"groups of {group_size}"]
    words += ["symmetric" if symmetric else "with zero points"]
    words += ["desc_act"] * desc_act + ["v2"] * (version == 2)
    return Recipe(
        name=f"gptq, {', '.join(words)}",
        config={
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": desc_act,
            "sym": symmetric,
            "checkpoint_format": "gptq_v2" if version == 2 else "gptq",
        },
        # act-order is by a layer's inputs, which those that read the same have in common
        layer=lambda weight, largest: gptq(
            weight,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            order_seed=weight.shape[1] if desc_act else None,
            version=version,
        ),
    )


def fp8_recipe(scales: str | tuple[int, int], *, static: bool = False) -> Recipe:
    block = None if isinstance(scales, str) else list(scales)
    words = f"a scale for each {scales}" if block is None else f"blocks of {block[0]} × {block[1]}"
    config: dict[str, Any] = {
        "quant_method": "fbgemm_fp8" if scales == "row" else "fp8",
        "activation_scheme": "static" if static else "dynamic",
    }
    if block is not None:
        config |= {"weight_block_size": block, "fmt": "e4m3"}
    return Recipe(
        name=f"fp8, {words}, {'static' if static else 'dynamic'}",
        config=config,
        layer=lambda weight, largest: fp8(
            weight,
            scales,
            largest_input=largest if static else None,
            scale_name="weight_scale" if block is None else "weight_scale_inv",
        ),
    )


def is_quantised(name: str, tensor: Tensor) -> bool:
    """Linear layers of attention, MLP and experts, as those tools choose them."""
    layers = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
    return name.endswith(layers) and tensor.dim() == 2


def write_checkpoint(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    recipe: Recipe,
    folder: Path,
    largest_inputs: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """config.json and model.safetensors; what every tensor of the plain model is worth now, in float32."""
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not is_quantised(name, tensor):
            stored[name], values[name] = tensor.contiguous(), tensor.float()
            continue
        module = name.removesuffix(".weight")
        written = recipe.layer(tensor.float(), (largest_inputs or {}).get(module, 16.0))
        values[name] = written.value
        stored |= {f"{module}.{kind}": t.contiguous() for kind, t in written.tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**config, "quantization_config": dict(recipe.config)}, indent=2)
    (folder / "config.json").write_text(text)
    save_file(stored, folder / "model.safetensors")
    return values


def rounded(weight: Tensor, kind: str) -> Tensor:
    """What a weight is worth that is quantised while it is loaded: int8 and fp8 have a scale for each row, int4 one
    for each group of 64 inputs, the number of largest size of which is -8.
    """
    if kind == "int4":
        groups = weight.view(len(weight), -1, 64)
        low, high = groups.amin(2, True), groups.amax(2, True)
        scale = torch.where(-low >= high, low, high) / -8
        scale = torch.where(scale == 0, 1.0, scale)
        return (scale * (groups / scale).round().clamp(-8, 7)).view(weight.shape)
    largest = {"int8": 127, "fp8": 448}[kind]
    scale = weight.abs().amax(1, keepdim=True) / largest
    scale = torch.where(scale == 0, 1.0, scale)
    if kind == "int8":
        return (weight / scale).round() * scale
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def write_gguf(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: str, path: Path
) -> dict[str, Tensor]:
    """A Llama whose layers have a type of ggml's, quantised and valued by the gguf package; others are F32."""
    values: dict[str, Tensor] = {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    for name, tensor in tensors.items():
        stored, values[name] = tensor.float().numpy(), tensor.float()
        there = gguf_name(name)
        if not is_quantised(name, tensor):
            writer.add_tensor(there, stored)
            continue
        type_ = gguf.GGMLQuantizationType[kind]
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        is_turned = "q_proj" in name or "k_proj" in name
        raw = gguf.quantize(interleave(stored, heads) if is_turned else stored, type_)
        value = gguf.dequantize(raw, type_)
        values[name] = torch.from_numpy(separate(value, heads) if is_turned else value)
        writer.add_tensor(there, raw, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def gguf_name(name: str) -> str:
    """ "model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight" """
    names = {ours: theirs for theirs, ours in GGUF_NAMES.items()}
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        return f"{names[module]}.weight"
    layer, stem = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{names[stem]}.weight"


def interleave(rows: Floats, num_heads: int) -> Floats:
    """Of each head, the rows of its halves in turn, as GGUF has those of Llama's q and k."""
    halves = rows.reshape(num_heads, 2, -1, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def separate(rows: Floats, num_heads: int) -> Floats:
    """The other way."""
    halves = rows.reshape(num_heads, -1, 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)
