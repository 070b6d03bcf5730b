"""Models to quantise in every format: the default model, and a small random one whose sizes are multiples of 256."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quantizers import (
    Recipe,
    awq_recipe,
    fp8_recipe,
    gptq_recipe,
    is_quantised,
    rounded,
    write_checkpoint,
    write_gguf,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from chipset.core.files import ModelFiles
from chipset.core.loading.gguf_source import GgufSource
from chipset.core.loading.resolve import find_model

Largest = Callable[[], Mapping[str, float]]
"""The largest input of each layer, asked for when it is needed."""
SMALL: Mapping[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, kw_only=True)
class PlainModel:
    """config.json, and the weights by Transformers' names."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """A model in files of one format."""

    files: ModelFiles
    quantize: str | None
    """As the flag."""
    values: Mapping[str, Tensor]
    """f32, what its weights are worth by whoever wrote them."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A row of the table."""

    name: str
    write: Callable[[PlainModel, Path], Quantised]
    """Into a folder."""


def default_model() -> PlainModel:
    """Its file holds blocks of Q4_1; these are the numbers that they stand for."""
    files = find_model(None)
    source = GgufSource(files.weights[0])
    return PlainModel(
        name=files.name,
        config=json.loads(files.config.read_text()),
        tensors={name: source.read(name).clone() for name in source.names},
    )


def small_model(config: PretrainedConfig | None = None) -> PlainModel:
    """A random one, whose texts mean nothing; a Llama where nothing else is asked for."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    with tempfile.TemporaryDirectory() as folder:
        # the names of tensors are those of files, not those of modules
        model.save_pretrained(folder)
        return PlainModel(
            name="a small random Llama" if config is None else config.model_type,
            config=json.loads((Path(folder) / "config.json").read_text()),
            tensors=load_file(Path(folder) / "model.safetensors"),
        )


def transformers_model(config: Mapping[str, Any], values: Mapping[str, Tensor]) -> torch.nn.Module:
    """The oracle: plain, in float32, with what the weights are worth."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)))
        tensors = {name: value.contiguous() for name, value in values.items()}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()  # type: ignore[no-any-return]


@torch.inference_mode()
def transformers_logits(model: torch.nn.Module, ids: Sequence[int]) -> Tensor:
    """f32 [T, V]"""
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0]  # type: ignore[no-any-return]


def largest_inputs(model: torch.nn.Module, ids: Sequence[int]) -> Mapping[str, float]:
    """Of each linear layer, on one text: what static scales are made of."""
    found: dict[str, float] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            found[name] = max(found.get(name, 0.0), given[0].abs().max().item())

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    transformers_logits(model, ids)
    for hook in hooks:
        hook.remove()
    return found


def plain() -> Format:
    def write(model: PlainModel, folder: Path) -> Quantised:
        values = {name: tensor.float() for name, tensor in model.tensors.items()}
        return Quantised(files=_write_plain(model, folder), quantize=None, values=values)

    return Format(name="plain", write=write)


def stored(recipe: Recipe, largest: Largest = dict) -> Format:
    """`largest`: for static scales."""

    def write(model: PlainModel, folder: Path) -> Quantised:
        values = write_checkpoint(model.config, model.tensors, recipe, folder, largest())
        return Quantised(files=_files(folder), quantize=None, values=values)

    return Format(name=recipe.name, write=write)


def on_the_fly(kind: str) -> Format:
    def write(model: PlainModel, folder: Path) -> Quantised:
        values = {
            name: rounded(tensor.float(), kind) if is_quantised(name, tensor) else tensor.float()
            for name, tensor in model.tensors.items()
        }
        return Quantised(files=_write_plain(model, folder), quantize=kind, values=values)

    return Format(name=f"--quantize {kind}", write=write)


def gguf_blocks(kind: str) -> Format:
    def write(model: PlainModel, folder: Path) -> Quantised:
        (folder / "config.json").write_text(json.dumps(dict(model.config)))
        path = folder / "model.gguf"
        values = write_gguf(model.config, model.tensors, kind, path)
        return Quantised(files=_files(folder, path), quantize=None, values=values)

    return Format(name=f"GGUF, {kind}", write=write)


def formats(group_size: int, largest: Largest) -> Sequence[Format]:
    """All there are, with groups of that size where a format leaves it open."""
    return (
        plain(),
        *(on_the_fly(kind) for kind in ("int8", "int4", "fp8")),
        stored(awq_recipe(group_size)),
        stored(gptq_recipe(group_size)),
        stored(gptq_recipe(group_size, symmetric=False)),
        stored(gptq_recipe(group_size, symmetric=False, version=2)),
        stored(gptq_recipe(group_size, desc_act=True)),
        stored(gptq_recipe(group_size, bits=8)),
        stored(fp8_recipe("layer")),
        stored(fp8_recipe("layer", static=True), largest),
        stored(fp8_recipe("row")),
        stored(fp8_recipe((128, 128))),
        *(gguf_blocks(kind) for kind in ("Q4_0", "Q4_1", "Q8_0")),
    )


def _write_plain(model: PlainModel, folder: Path) -> ModelFiles:
    (folder / "config.json").write_text(json.dumps(dict(model.config)))
    tensors = {name: tensor.contiguous() for name, tensor in model.tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return _files(folder)


def _files(folder: Path, weights: Path | None = None) -> ModelFiles:
    """Without a tokenizer: nothing here reads one."""
    return ModelFiles(
        source=str(folder),
        name=folder.name,
        revision=None,
        config=folder / "config.json",
        tokenizer=folder / "tokenizer.json",
        tokenizer_config=None,
        chat_template=None,
        generation_config=None,
        weights=(weights or folder / "model.safetensors",),
    )
