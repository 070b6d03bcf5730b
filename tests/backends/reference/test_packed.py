"""Packed weights of both builders of linear layers, against what the bits of their numbers are worth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from chipset.backends.conformance.packed_weights import (
    FORMATS,
    format_name,
    make_packed,
    worth,
)
from chipset.backends.quantization import Linear, LinearSpec, WeightFormat
from chipset.backends.reference.packed import KINDS, PackedWeight
from chipset.backends.reference.quantization import ReferenceLinear
from chipset.backends.reference.runtime import HostRuntime
from chipset.plugins.cpu.product import Product
from chipset.plugins.cpu.quantization import CPULinear

BUILDERS = {
    "reference": lambda: ReferenceLinear(HostRuntime(), KINDS | {"plain"}),
    "cpu": lambda: CPULinear(HostRuntime(), Product(native_bfloat16=True)),
    "cpu without bfloat16": lambda: CPULinear(HostRuntime(), Product(native_bfloat16=False)),
}


@pytest.fixture(params=BUILDERS)
def linear(request: pytest.FixtureRequest) -> Linear:
    return BUILDERS[request.param]()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def spec(dtype: str, out_dtype: str, parts: tuple[int, ...], *, bias: bool = False) -> LinearSpec:
    return LinearSpec(
        name="layers.0.attention.qkv",
        in_features=128,
        out_features=sum(parts),
        parts=parts,
        bias=bias,
        dtype=dtype,
        out_dtype=out_dtype,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight", FORMATS, ids=format_name)
def test_a_packed_layer_multiplies_by_what_its_numbers_are_worth(
    linear: Linear, weight: WeightFormat, dtype: str
) -> None:
    tolerance = 1e-5 if dtype == "float32" else 8e-3
    for num_outputs in (160, 33):
        tensors = make_packed(weight, num_outputs, 128, largest_input=4.0)
        expected_weight = torch.from_numpy(worth(weight, tensors, 128))
        packed = replace(spec(dtype, dtype, (num_outputs,)), weight=weight)
        layer = linear.build(packed, tensors)
        for num_tokens in (0, 1, 5, 40):
            x = random(num_tokens, 128, dtype=getattr(torch, dtype))
            (found,) = layer(x)
            assert found.dtype == x.dtype
            expected = x.double() @ expected_weight.T
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_a_packed_layer_adds_its_bias_and_gives_its_parts(linear: Linear, kind: str) -> None:
    weight = WeightFormat(kind=kind, group_size=64)
    packed = replace(spec("bfloat16", "float32", (32, 7), bias=True), weight=weight)
    tensors = make_packed(weight, 39, 128)
    expected = torch.from_numpy(worth(weight, tensors, 128))
    tensors["bias"] = random(39, dtype=torch.bfloat16)
    x = random(3, 128, dtype=torch.bfloat16)
    found = linear.build(packed, tensors)(x)
    assert [tuple(part.shape) for part in found] == [(3, 32), (3, 7)]
    wanted = x.double() @ expected.T + tensors["bias"].double()
    torch.testing.assert_close(torch.cat(found, -1).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed_one", ["gate_up", "down", "both"])
def test_experts_may_be_packed_plain_or_mixed(linear: Linear, packed_one: str) -> None:
    experts, hidden, inner = 3, 64, 96
    specs, tensors, weights = {}, {}, {}
    sizes = {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    for name, (rows, columns) in sizes.items():
        is_packed = packed_one in (name, "both")
        form = WeightFormat(kind="int4", group_size=32) if is_packed else WeightFormat()
        each = [
            make_packed(form, rows, columns, seed=index)
            if is_packed
            else {"weight": random(rows, columns + index)[:, :columns] * columns**-0.5}
            for index in range(experts)
        ]
        tensors[name] = {key: torch.stack([one[key] for one in each]) for key in each[0]}
        tensors[name]["bias"] = random(experts, rows)
        weights[name] = [
            torch.from_numpy(worth(form, one, columns)) if is_packed else one["weight"].double()
            for one in each
        ]
        parts = (inner, inner) if name == "gate_up" else (hidden,)
        specs[name] = replace(
            spec("float32", "float32", parts, bias=True),
            in_features=columns,
            weight=form,
            num_experts=experts,
        )
    module = linear.build_experts(specs["gate_up"], specs["down"], tensors, "silu")
    x, share = random(4, hidden), torch.rand(4, 2)
    ids = torch.tensor([[0, 2], [2, 0], [2, 1], [0, 1]], dtype=torch.int32)
    expected = torch.zeros(4, hidden, dtype=torch.float64)
    for token in range(4):
        for portion, expert in zip(share[token].double(), ids[token].tolist(), strict=True):
            up = weights["gate_up"][expert] @ x[token].double() + tensors["gate_up"]["bias"][expert]
            inside = torch.nn.functional.silu(up[:inner]) * up[inner:]
            out = weights["down"][expert] @ inside + tensors["down"]["bias"][expert]
            expected[token] += portion * out
    torch.testing.assert_close(module(x, share, ids).double(), expected, rtol=1e-4, atol=1e-4)


def test_columns_that_stand_for_padding_multiply_nothing() -> None:
    form = WeightFormat(kind="int8", group_size=4, permuted=True)
    order = torch.tensor([2, 4, 0, 4, 1, 4, 3, 4], dtype=torch.int32)
    tensors = {
        "weight": torch.arange(1, 9, dtype=torch.int8)[None],
        "scale": torch.tensor([[1.0, 10.0]]),
        "order": order,
    }
    x = torch.tensor([[1.0, 0.1, 0.01, 0.001]])
    found = PackedWeight(form, tensors)(x)
    torch.testing.assert_close(found, torch.tensor([[3.0 + 5 + 0.01 + 0.07]]))
