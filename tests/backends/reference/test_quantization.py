"""Both builders of linear layers against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from chipset.backends.quantization import EmbeddingSpec, Linear, LinearSpec, WeightFormat
from chipset.backends.reference.quantization import ReferenceLinear
from chipset.backends.reference.runtime import HostRuntime
from chipset.plugins.cpu.product import Product
from chipset.plugins.cpu.quantization import CPULinear

BUILDERS = {
    "reference": lambda: ReferenceLinear(HostRuntime()),
    "cpu": lambda: CPULinear(HostRuntime(), Product(native_bfloat16=True)),
    "cpu without bfloat16": lambda: CPULinear(HostRuntime(), Product(native_bfloat16=False)),
}


@pytest.fixture(params=BUILDERS)
def linear(request: pytest.FixtureRequest) -> Linear:
    return BUILDERS[request.param]()


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def spec(dtype: str, out_dtype: str, parts: tuple[int, ...], *, bias: bool = False) -> LinearSpec:
    return LinearSpec(
        name="layers.0.attention.qkv",
        in_features=48,
        out_features=sum(parts),
        parts=parts,
        bias=bias,
        dtype=dtype,
        out_dtype=out_dtype,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parts", [(30, 10, 10), (7,)])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
)
def test_the_product_is_right_for_any_number_of_tokens(
    linear: Linear, bias: bool, parts: tuple[int, ...], dtype: str, out_dtype: str
) -> None:
    kind = getattr(torch, dtype)
    tensors = {"weight": random(sum(parts), 48, dtype=kind)}
    if bias:
        tensors["bias"] = random(sum(parts), dtype=kind)
    layer = linear.build(spec(dtype, out_dtype, parts, bias=bias), tensors)
    tolerance = 1e-5 if out_dtype == "float32" else 8e-3
    for num_tokens in (0, 1, 2, 3, 4, 5, 8, 9, 40):
        x = random(num_tokens, 48, dtype=kind)
        found = layer(x)
        assert [part.shape for part in found] == [(num_tokens, n) for n in parts]
        assert {part.dtype for part in found} == {getattr(torch, out_dtype)}
        expected = x.double() @ tensors["weight"].double().T
        if bias:
            expected = expected + tensors["bias"].double()
        joined = torch.cat(found, -1).double()
        torch.testing.assert_close(joined, expected, rtol=tolerance, atol=10 * tolerance)


def test_logits_of_a_bfloat16_model_are_not_rounded(linear: Linear) -> None:
    weight, x = random(500, 48, dtype=torch.bfloat16), random(2, 48, dtype=torch.bfloat16)
    (logits,) = linear.build(spec("bfloat16", "float32", (500,)), {"weight": weight})(x)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_a_weight_larger_than_a_slice_is_widened_slice_by_slice() -> None:
    weight, bias = random(150, 48, dtype=torch.bfloat16), random(150, dtype=torch.bfloat16)
    x = random(6, 48, dtype=torch.bfloat16)
    sliced = Product(native_bfloat16=False, slice_numbers=48 * 4)
    found = sliced(x, weight, bias, torch.float32)
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_products_do_not_share_memory_that_the_next_overwrites(linear: Linear) -> None:
    first = linear.build(spec("bfloat16", "bfloat16", (8,)), {"weight": random(8, 48).bfloat16()})
    second = linear.build(spec("bfloat16", "bfloat16", (8,)), {"weight": random(8, 48).bfloat16()})
    x = random(6, 48).bfloat16()
    (found,) = first(x)
    kept = found.clone()
    second(x + 1)
    assert torch.equal(found, kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_head_shares_the_weight_of_the_embedding(linear: Linear, dtype: str) -> None:
    weight = random(50, 48, dtype=getattr(torch, dtype))
    table = EmbeddingSpec(first_row=0, num_rows=50, hidden_size=48, dtype=dtype)
    embedding, head = linear.build_embedding(table, weight, spec(dtype, "float32", (50,)))
    assert head is not None
    held = [b.data_ptr() for m in (embedding, head) for b in m.buffers()]
    assert held == [weight.data_ptr()] * 2
    ids = torch.tensor([3, 49, 0], dtype=torch.int32)
    assert torch.equal(embedding(ids), weight[ids.long()])
    assert head(embedding(ids))[0].dtype == torch.float32


def test_rows_of_another_rank_are_zero(linear: Linear) -> None:
    weight = random(10, 4)
    table = EmbeddingSpec(first_row=20, num_rows=10, hidden_size=4, dtype="float32")
    embedding, head = linear.build_embedding(table, weight, None)
    assert head is None
    found = embedding(torch.tensor([19, 20, 29, 30], dtype=torch.int32))
    zero = torch.zeros(4)
    torch.testing.assert_close(found, torch.stack((zero, weight[0], weight[9], zero)))


@pytest.mark.parametrize("with_bias", [False, True])
def test_experts_are_a_weighted_sum_of_those_chosen(linear: Linear, with_bias: bool) -> None:
    experts, hidden, inner = 5, 48, 12
    tensors = {
        "gate_up": {"weight": random(experts, 2 * inner, hidden)},
        "down": {"weight": random(experts, hidden, inner)},
    }
    if with_bias:
        tensors["gate_up"]["bias"] = random(experts, 2 * inner)
        tensors["down"]["bias"] = random(experts, hidden)
    module = linear.build_experts(
        spec("float32", "float32", (inner, inner)),
        spec("float32", "float32", (hidden,)),
        tensors,
        "silu",
    )
    x, weights = random(7, hidden), torch.rand(7, 2)
    ids = torch.tensor([[0, 3], [3, 0], [1, 2], [2, 3], [0, 1], [3, 2], [0, 2]], dtype=torch.int32)
    expected = torch.zeros(7, hidden, dtype=torch.float64)
    for token in range(7):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            part = {n: {k: t[expert].double() for k, t in of.items()} for n, of in tensors.items()}
            up = part["gate_up"]["weight"] @ x[token].double() + part["gate_up"].get("bias", 0)
            inside = torch.nn.functional.silu(up[:inner]) * up[inner:]
            out = part["down"]["weight"] @ inside + part["down"].get("bias", 0)
            expected[token] += weight * out
    torch.testing.assert_close(module(x, weights, ids).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int4", "codebook"])
def test_a_kind_that_is_not_taken_is_refused_with_its_name(kind: str) -> None:
    packed = replace(
        spec("float32", "float32", (4,)), weight=WeightFormat(kind=kind, group_size=16)
    )
    (verdict,) = ReferenceLinear(HostRuntime(), {"plain", "int8"}).kernels(packed)
    assert not verdict.ok
    assert kind in verdict.reason


def test_a_kind_of_a_plugin_is_refused_with_its_name(linear: Linear) -> None:
    packed = replace(spec("float32", "float32", (4,)), weight=WeightFormat(kind="codebook"))
    (verdict,) = linear.kernels(packed)
    assert not verdict.ok
    assert "codebook" in verdict.reason
