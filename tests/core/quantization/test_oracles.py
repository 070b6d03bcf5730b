"""The same tensors, read by the libraries whose layouts they are; scripts/test-oracles fetches those."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from quantizers import Recipe, awq_recipe, gptq_recipe
from torch import Tensor

from chipset.core.quantization.canonical import dequantise

from .test_formats import MODULE, scheme, weight

FOLDER = os.environ.get("CHIPSET_ORACLES")
pytestmark = pytest.mark.skipif(not FOLDER, reason="run by scripts/test-oracles")


def load(path: str) -> ModuleType:
    """One file of a library that as a whole wants other versions of everything."""
    assert FOLDER
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(FOLDER) / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(recipe: Recipe, tensors: Mapping[str, Tensor]) -> Tensor:
    return dequantise(scheme(recipe).pack(MODULE, tensors))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_awq_is_worth_what_autoawq_says(group_size: int) -> None:
    recipe = awq_recipe(group_size)
    tensors = recipe.layer(weight(), 8.0).tensors
    library = load("awq/utils/packing_utils.py")
    # its scales as float32, or it would round every number to float16
    wanted = library.dequantize_gemm(
        tensors["qweight"], tensors["qzeros"], tensors["scales"].float(), 4, group_size
    )
    assert torch.equal(ours(recipe, tensors), wanted.T)


def autogptq(tensors: Mapping[str, Tensor], bits: int, group_size: int, kernel: str) -> Tensor:
    """Its layer on a CPU, applied to the unit vectors."""
    library = load(f"auto_gptq/nn_modules/qlinear/{kernel}.py")
    layer = library.QuantLinear(bits, group_size, 384, 96, bias=False, weight_dtype=torch.float32)
    layer.load_state_dict({**tensors, "scales": tensors["scales"].float()})
    return layer(torch.eye(384)).T  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_worth_what_autogptq_says(bits: int, group_size: int, symmetric: bool) -> None:
    recipe = gptq_recipe(group_size, bits=bits, symmetric=symmetric)
    tensors = recipe.layer(weight(), 8.0).tensors
    wanted = autogptq(tensors, bits, group_size, "qlinear_cuda_old")
    assert torch.equal(ours(recipe, tensors), wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_desc_act_is_worth_what_autogptq_says(bits: int) -> None:
    # symmetric: this kernel of theirs takes a stored zero point of 15 for 16, where the other has 0
    recipe = gptq_recipe(64, bits=bits, desc_act=True)
    tensors = recipe.layer(weight(), 8.0).tensors
    assert torch.equal(ours(recipe, tensors), autogptq(tensors, bits, 64, "qlinear_cuda"))
