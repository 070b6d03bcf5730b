"""Canonical weights of every form, drawn by hypothesis."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from chipset.backends.formats import Packed
from chipset.backends.quantization import WeightFormat

FORMS = [
    {"kind": "plain"},
    {"kind": "int4"},
    {"kind": "int4", "zero_points": "whole"},
    {"kind": "int4", "zero_points": "real"},
    {"kind": "int4", "permuted": True},
    {"kind": "int4", "permuted": True, "zero_points": "whole"},
    {"kind": "int8"},
    {"kind": "int8", "zero_points": "whole"},
    {"kind": "int8", "permuted": True},
    {"kind": "int8", "activation": "dynamic_token"},
    {"kind": "fp8"},
    {"kind": "fp8", "block": True},
    {"kind": "fp8", "block": True, "activation": "dynamic_token"},
    {"kind": "fp8", "activation": "static_tensor"},
]


def numbers(kind: str, generator: torch.Generator, *shape: int) -> Tensor:
    """A canonical "weight" of [..., N, K]."""
    if kind == "int4":
        half = (*shape[:-1], shape[-1] // 2)
        return torch.randint(0, 256, half, generator=generator, dtype=torch.uint8)
    if kind == "int8":
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    weight = torch.randn(shape, generator=generator)
    return weight.to(torch.float8_e4m3fn) if kind == "fp8" else weight.bfloat16()


def weight(
    form: dict[str, Any], rows: int, groups: int, size: int, seed: int, experts: int = 0
) -> Packed:
    """[rows, groups * size], or a little less where blocks may end early."""
    generator = torch.Generator().manual_seed(seed)
    kind, is_block = form["kind"], bool(form.get("block"))
    columns = groups * size - (size // 2 if is_block and size > 2 else 0)
    lead = (experts,) if experts else ()
    tensors = {"weight": numbers(kind, generator, *lead, rows, columns)}
    block = (3, size) if is_block else None
    group_size = None if is_block or groups == 1 or kind == "plain" else size
    if kind != "plain":
        grid = (*lead, -(-rows // 3) if is_block else rows, groups)
        tensors["scale"] = torch.rand(grid, generator=generator) + 0.1
        if form.get("zero_points") == "whole":
            tensors["zero_point"] = torch.randint(0, 17, grid, generator=generator).float()
        if form.get("zero_points") == "real":
            tensors["zero_point"] = torch.randn(grid, generator=generator)
    if form.get("permuted"):
        orders = [torch.randperm(columns, generator=generator) for _ in range(experts or 1)]
        stacked = torch.stack(orders).to(torch.int32)
        tensors["order"] = stacked if experts else stacked[0]
    if form.get("activation") == "static_tensor":
        tensors["input_scale"] = torch.rand(lead, generator=generator)
    fields = form | {"block": block, "group_size": group_size}
    return Packed(format=WeightFormat(**fields), tensors=tensors)


@st.composite
def weights(draw: st.DrawFn, experts: bool = True) -> Packed:
    return weight(
        draw(st.sampled_from(FORMS)),
        rows=draw(st.integers(1, 8)),
        groups=draw(st.integers(1, 4)),
        size=draw(st.sampled_from([2, 4, 6, 8, 32])),
        seed=draw(st.integers(0, 2**16)),
        experts=draw(st.sampled_from([0, 0, 3])) if experts else 0,
    )
