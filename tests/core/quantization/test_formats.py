from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from quantizers import (
    Recipe,
    awq_recipe,
    fp8_recipe,
    gptq_recipe,
)
from torch import Tensor

from chipset.backends.formats import Scheme, StoredTensor
from chipset.core.quantization.canonical import dequantise
from chipset.core.quantization.select import FORMATS

from .test_canonical import assert_canonical

MODULE = "model.layers.0.mlp.down_proj"
RECIPES = [
    awq_recipe(32),
    awq_recipe(64),
    awq_recipe(128),
    awq_recipe(-1),
    *(
        gptq_recipe(64, bits=bits, symmetric=s, version=v)
        for bits in (4, 8)
        for s in (True, False)
        for v in (1, 2)
    ),
    gptq_recipe(-1),
    gptq_recipe(-1, bits=8, symmetric=False),
    gptq_recipe(64, desc_act=True),
    gptq_recipe(64, bits=8, desc_act=True, symmetric=False),
    gptq_recipe(-1, desc_act=True),
    fp8_recipe("layer"),
    fp8_recipe("layer", static=True),
    fp8_recipe("row"),
    fp8_recipe((128, 128)),
]


def scheme(recipe: Recipe) -> Scheme:
    name = str(recipe.config["quant_method"]).removeprefix("fbgemm_")
    return next(known for known in FORMATS if known.name == name).read(recipe.config)


def weight(rows: int = 96, columns: int = 384, seed: int = 0) -> Tensor:
    """With some rows that are far larger, all of one sign, or nothing at all."""
    found = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found[1] *= 50
    found[2] = found[2].abs() + 1
    found[3] = -found[3].abs()
    found[4] = 0
    return found


def part(tensor: Tensor, stored: StoredTensor, rows: range, columns: range) -> Tensor:
    """What a rank reads that holds these outputs and inputs."""
    for number, axis in enumerate(stored.axes):
        if axis.of != "none":
            span = rows if axis.of == "out" else columns
            assert span.start % axis.features == 0
            end = -(-span.stop // axis.features)
            tensor = tensor.narrow(
                number, span.start // axis.features, end - span.start // axis.features
            )
    return tensor


def assert_stored(
    tensors: Mapping[str, Tensor], stored: Mapping[str, StoredTensor], rows: int, columns: int
) -> None:
    """Every tensor is what `stored` says of it, and nothing is missing."""
    assert set(tensors) <= set(stored)
    assert set(tensors) >= {name for name, what in stored.items() if not what.optional}
    for name, tensor in tensors.items():
        what = stored[name]
        assert str(tensor.dtype).removeprefix("torch.") in what.dtypes
        size = {"out": rows, "in": columns}
        wanted = tuple(
            axis.size if axis.of == "none" else math.ceil(size[axis.of] / axis.features)
            for axis in what.axes
        )
        assert tuple(tensor.shape) == wanted, name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_layer_is_worth_what_its_writer_meant(recipe: Recipe) -> None:
    written = recipe.layer(weight(), 8.0)
    known = scheme(recipe).stored(MODULE, 384, 96)
    assert known is not None
    assert_stored(written.tensors, known, 96, 384)
    packed = scheme(recipe).pack(MODULE, written.tensors)
    assert_canonical(packed)
    assert torch.equal(dequantise(packed), written.value)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(range(256), range(128, 256)), (range(128, 256), range(384)), (range(128), range(256, 384))],
)
def test_a_rank_packs_what_it_reads(recipe: Recipe, rows: range, columns: range) -> None:
    written, known = recipe.layer(weight(256), 8.0), scheme(recipe).stored(MODULE, 384, 256)
    assert known is not None
    read = {
        name: part(tensor, known[name], rows, columns) for name, tensor in written.tensors.items()
    }
    packed = scheme(recipe).pack(MODULE, read)
    assert_canonical(packed)
    wanted = written.value[rows.start : rows.stop, columns.start : columns.stop]
    assert torch.equal(dequantise(packed), wanted)
