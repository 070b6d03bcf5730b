"""Which kernel takes which packed layer on the CPU, what it holds, and the corners of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from chipset.backends.conformance.packed_weights import make_packed, worth
from chipset.backends.quantization import LinearSpec, WeightFormat
from chipset.backends.reference.runtime import HostRuntime
from chipset.plugins.cpu.packed import halves
from chipset.plugins.cpu.packed_library import Int4Weight, tile_rows
from chipset.plugins.cpu.product import SLICE_STEP, Product
from chipset.plugins.cpu.quantization import WIDENED, CPULinear


@pytest.fixture
def linear() -> CPULinear:
    return CPULinear(HostRuntime(), Product(native_bfloat16=False))


def spec(
    weight: WeightFormat, *, dtype: str = "bfloat16", size: tuple[int, int] = (192, 256)
) -> LinearSpec:
    return LinearSpec(
        name="layers.0.mlp.down",
        in_features=size[1],
        out_features=size[0],
        parts=(size[0],),
        dtype=dtype,
        out_dtype=dtype,
        weight=weight,
    )


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def held_bytes(module: nn.Module) -> int:
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in module.buffers()}
    return sum(storage.nbytes() for storage in memory.values())


INT4 = WeightFormat(kind="int4", group_size=64, zero_points="whole")
INT8 = WeightFormat(kind="int8")


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [
        (spec(INT4), "torch int4 packed"),
        (spec(replace(INT4, permuted=True, zero_points="real")), "torch int4 packed"),
        (spec(INT8), "torch int8 packed"),
        (spec(replace(INT8, activation="dynamic_token")), "torch int8 packed"),
        (spec(WeightFormat(kind="fp8", block=(128, 128))), WIDENED),
    ],
)
def test_the_best_kernel_takes_a_layer(linear: CPULinear, layer: LinearSpec, kernel: str) -> None:
    assert next(v.kernel for v in linear.kernels(layer) if v.ok) == kernel


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (spec(INT4, dtype="float32"), "bfloat16"),
        (spec(replace(INT4, group_size=16)), "32, 64, 128, 256 columns, not 16"),
        (spec(replace(INT4, group_size=None)), "not all of them"),
        (spec(INT4, size=(40, 256)), "40 outputs"),
        (spec(INT8, dtype="float32"), "bfloat16"),
        (replace(spec(INT8), out_dtype="float32"), "bfloat16"),
        (spec(replace(INT8, group_size=64)), "one scale a row"),
        (spec(replace(INT8, zero_points="whole")), "no zero points"),
        (spec(INT8, size=(192, 17)), "17 inputs"),
    ],
)
def test_what_torchs_kernels_do_not_take_is_widened(
    linear: CPULinear, layer: LinearSpec, words: str
) -> None:
    refused, taken = linear.kernels(layer)
    assert (refused.ok, taken.ok, taken.kernel) == (False, True, WIDENED)
    assert words in refused.reason
    tensors = make_packed(layer.weight, layer.out_features, layer.in_features)
    x = random(3, layer.in_features, dtype=getattr(torch, layer.dtype))
    (found,) = linear.build(layer, tensors)(x)
    expected = x.double() @ torch.from_numpy(worth(layer.weight, tensors, layer.in_features)).T
    torch.testing.assert_close(found.double(), expected, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize(
    ("weight", "dtype", "most"),
    [
        (replace(INT4, zero_points="none"), "bfloat16", 0.5625),
        (INT4, "bfloat16", 0.5625),
        (replace(INT4, zero_points="real"), "bfloat16", 0.5625),
        (replace(INT4, zero_points="none"), "float32", 0.5625),
        (INT4, "float32", 0.578125),
        (INT8, "bfloat16", 1 + 4 / 576),
        (INT8, "float32", 1 + 4 / 576),
        (WeightFormat(kind="fp8"), "float32", 1 + 4 / 576),
        (WeightFormat(kind="fp8", block=(128, 128)), "float32", 1 + 4 * 5 / 576),
    ],
)
def test_a_weight_is_held_once_and_packed(
    linear: CPULinear, weight: WeightFormat, dtype: str, most: float
) -> None:
    tensors = make_packed(weight, 1536, 576)
    layer = linear.build(spec(weight, dtype=dtype, size=(1536, 576)), tensors)
    del tensors
    assert held_bytes(layer) <= round(most * 1536 * 576)


def test_few_rows_and_many_give_the_same_by_torchs_int4(linear: CPULinear) -> None:
    tensors = make_packed(INT4, 192, 256)
    layer = Int4Weight(INT4, tensors, linear.product, linear.codes)
    x = random(40, 256, dtype=torch.bfloat16)
    layer.tile = tile_rows()
    many = layer(x, torch.bfloat16).float()
    layer.tile = None
    library = layer(x, torch.bfloat16).float()
    torch.testing.assert_close(many, library, rtol=8e-3, atol=8e-3)


def test_torchs_int4_layout_is_known_or_said_to_be_unknown() -> None:
    size = tile_rows()
    assert size is None or SLICE_STEP % size == 0


@pytest.mark.parametrize("weight", [INT4, replace(INT4, group_size=None), INT8], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_of_many_slices_is_widened_slice_by_slice(
    weight: WeightFormat, dtype: str
) -> None:
    sliced = CPULinear(HostRuntime(), Product(native_bfloat16=False, slice_numbers=1))
    tensors = make_packed(weight, 208, 256)
    x = random(40, 256, dtype=getattr(torch, dtype))
    (found,) = sliced.build(spec(weight, dtype=dtype, size=(208, 256)), tensors)(x)
    expected = x.double() @ torch.from_numpy(worth(weight, tensors, 256)).T
    torch.testing.assert_close(found.double(), expected, rtol=8e-3, atol=1.6e-2)


def test_every_fp8_number_is_widened_exactly(linear: CPULinear) -> None:
    form = WeightFormat(kind="fp8")
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    weight = codes.view(torch.float8_e4m3fn)[:, None]
    tensors = {"weight": weight, "scale": torch.full((254, 1), 3.0)}
    layer = linear.build(spec(form, dtype="float32", size=(254, 1)), tensors)
    (found,) = layer(torch.ones(1, 1))
    assert torch.equal(found[0], weight[:, 0].float() * 3)


def test_zero_points_that_int4_cannot_hold_are_exact_too(linear: CPULinear) -> None:
    form = WeightFormat(kind="int4", group_size=2, zero_points="whole")
    tensors = {
        "weight": torch.tensor([[0xF0, 0x21]], dtype=torch.uint8),
        "scale": torch.ones(1, 2),
        "zero_point": torch.tensor([[-3.0, 1000.0]]),
    }
    layer = linear.build(spec(form, dtype="float32", size=(1, 4)), tensors)
    (found,) = layer(torch.eye(4))
    assert found[:, 0].tolist() == [3, 18, -999, -998]


def test_the_halves_of_a_slice_lie_side_by_side() -> None:
    codes = torch.tensor([[1], [2], [3], [4], [5], [6], [7]], dtype=torch.uint8)
    packed = halves(codes, 4)
    assert packed[:, 0].tolist() == [0x31, 0x42, 0x75, 0x06]
