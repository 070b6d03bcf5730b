"""Files of fp8 that Transformers reads as well, and what it makes of them."""

from __future__ import annotations

from pathlib import Path

import torch
from quantised_models import small_model
from quantizers import fp8_recipe, write_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from chipset.core.quantization.canonical import dequantise

from .test_formats import scheme

E4M3 = torch.float8_e4m3fn


def test_blocks_of_fp8_are_worth_what_transformers_says(tmp_path: Path) -> None:
    model, recipe = small_model(), fp8_recipe((128, 128))
    write_checkpoint(model.config, model.tensors, recipe, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128)),
    )
    theirs = loaded.state_dict()
    stored = load_file(tmp_path / "model.safetensors")
    modules = [name.removesuffix(".weight") for name, t in stored.items() if t.dtype == E4M3]
    assert len(modules) == 14
    for module in modules:
        tensors = {kind: stored[f"{module}.{kind}"] for kind in ("weight", "weight_scale_inv")}
        ours = dequantise(scheme(recipe).pack(module, tensors))
        assert torch.equal(ours, theirs[f"{module}.weight"].float())
