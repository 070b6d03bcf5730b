"""Both sets of operations against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chipset.backends.errors import PluginError
from chipset.backends.ops import Ops
from chipset.backends.reference.ops import ReferenceOps
from chipset.plugins.cpu.ops import CPUOps

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[ReferenceOps, CPUOps])
def ops(request: pytest.FixtureRequest) -> Ops:
    return request.param()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * wide.to(x.dtype)


def gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    return (wide * (1.0 + weight.float())).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_before_the_weight_like_llama(ops: Ops, dtype: torch.dtype) -> None:
    x, weight = random(5, 3, 32, dtype=dtype), random(32, dtype=dtype)
    expected = llama_norm(x, weight)
    found = ops.rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    if dtype == torch.bfloat16:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_after_the_weight_like_gemma(ops: Ops, dtype: torch.dtype) -> None:
    x, weight = random(5, 32, dtype=dtype), random(32, dtype=dtype)
    found = ops.rms_norm(x, weight, 1e-5, offset=1.0, weight_in_float=True)
    assert found.dtype == dtype
    torch.testing.assert_close(found, gemma_norm(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_gives_the_sum_too(ops: Ops, dtype: torch.dtype) -> None:
    x, residual, weight = (random(*s, dtype=dtype) for s in ((4, 16), (4, 16), (16,)))
    norm, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(norm, llama_norm(x + residual, weight))


def test_layer_norm(ops: Ops) -> None:
    x, weight, bias = random(4, 16), random(16), random(16)
    expected = (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    torch.testing.assert_close(ops.layer_norm(x, weight, bias, 1e-5), expected * weight + bias)
    torch.testing.assert_close(ops.layer_norm(x, weight, None, 1e-5), expected * weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [8, 4])
def test_rope_turns_pairs_in_the_plane(
    ops: Ops, dtype: torch.dtype, interleaved: bool, rotated: int
) -> None:
    q, k, angle = (
        random(5, 4, 8, dtype=dtype),
        random(5, 2, 8, dtype=dtype),
        random(5, rotated // 2),
    )
    found = ops.rope(q, k, angle.cos(), angle.sin(), interleaved=interleaved)
    for x, out in zip((q, k), found, strict=True):
        assert out.shape == x.shape
        assert out.dtype == dtype
        assert torch.equal(out[..., rotated:], x[..., rotated:])
        for pair in range(rotated // 2):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotated // 2)
            point = torch.complex(x[..., a].float(), x[..., b].float())
            turned = point * torch.polar(torch.ones(5), angle[:, pair])[:, None]
            expected = torch.stack((turned.real, turned.imag), -1).to(dtype)
            torch.testing.assert_close(out[..., [a, b]], expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_is_the_activation_times_up(ops: Ops, name: str) -> None:
    gate, up = random(3, 8), random(3, 9)[:, :8]
    plain = {
        "silu": lambda x: x * torch.sigmoid(x),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "gelu_tanh": lambda x: (
            0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
        ),
        "relu": lambda x: x.clamp(min=0),
    }[name]
    torch.testing.assert_close(ops.activation(gate, name), plain(gate))
    torch.testing.assert_close(ops.gated(gate, up, name), plain(gate) * up)


def test_an_unknown_activation_is_named(ops: Ops) -> None:
    with pytest.raises(PluginError, match=r"swish.*silu"):
        ops.activation(random(1, 1), "swish")


@pytest.mark.parametrize("normalise", [False, True])
def test_route_takes_the_best_experts(ops: Ops, normalise: bool) -> None:
    logits = random(6, 5, dtype=torch.bfloat16)
    weights, ids = ops.route(logits, 2, normalise=normalise)
    share = torch.softmax(logits.float(), -1)
    best = share.topk(2, -1)
    assert ids.dtype == torch.int32
    assert ids.tolist() == best.indices.tolist()
    expected = best.values / best.values.sum(-1, keepdim=True) if normalise else best.values
    torch.testing.assert_close(weights, expected)
