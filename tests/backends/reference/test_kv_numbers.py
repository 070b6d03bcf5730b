from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from chipset.backends.reference.kv_numbers import INT8_MAX, float8_max, narrow, widen

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FINITE = st.floats(-(2.0**127), 2.0**127, width=32)
HEADS = npst.arrays("float32", (2, 2, 4), elements=FINITE)


@given(HEADS)
def test_int8_is_off_by_half_a_step_of_its_head_at_most(array: object) -> None:
    x = torch.tensor(array)
    numbers, scales = narrow(x, torch.int8, None)
    assert scales is not None
    assert (numbers.dtype, scales.shape) == (torch.int8, (2, 2))
    assert numbers.abs().max() <= INT8_MAX
    found = widen(numbers, scales, None)
    assert found.isfinite().all()
    error = (found.double() - x.double()).abs()
    # a subnormal scale is known to a few bits only
    step = scales.double()[..., None] * (1 + 1e-5) + 127 * 2.0**-149
    assert (error <= 0.5 * step + 127 * 2.0**-150).all()


def test_each_token_and_head_has_the_scale_of_its_largest_number() -> None:
    x = torch.tensor([[[1.0, -127.0], [0.5, 0.25]], [[0.0, 0.0], [-12.7, 3.0]]])
    numbers, scales = narrow(x, torch.int8, None)
    assert scales is not None
    assert torch.allclose(scales, torch.tensor([[1.0, 0.5 / 127], [0.0, 0.1]]))
    assert numbers.tolist() == [[[1, -127], [127, 64]], [[0, 0], [-127, 30]]]


@pytest.mark.parametrize("dtype", FLOAT8)
@given(HEADS)
def test_float8_is_finite_and_the_nearest_of_its_numbers(dtype: torch.dtype, array: object) -> None:
    x = torch.tensor(array)
    numbers, scales = narrow(x, dtype, None)
    assert scales is None
    all_ = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    all_ = all_[all_.isfinite()]
    nearest = (x.double()[..., None] - all_).abs().amin(-1)
    found = widen(numbers, None, None)
    assert torch.equal((x.double() - found.double()).abs(), nearest)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_is_divided_by_the_scale_of_its_layer_and_multiplied_again(
    dtype: torch.dtype,
) -> None:
    x, scale = torch.tensor([[[1e9, -1e9, 3.0, 96.0]]]), torch.tensor(8.0)
    numbers, _ = narrow(x, dtype, scale)
    limit = float8_max(dtype, None)
    assert numbers.float().flatten().tolist() == [limit, -limit, 0.375, 12.0]
    assert widen(numbers, None, scale).flatten().tolist() == [8 * limit, -8 * limit, 3.0, 96.0]


def test_a_device_whose_e4m3_ends_earlier_saturates_earlier() -> None:
    x = torch.tensor([[[300.0, -math.inf]]])
    numbers, _ = narrow(x, torch.float8_e4m3fn, None, fp8_max=240.0)
    assert numbers.float().flatten().tolist() == [240.0, -240.0]
    numbers, _ = narrow(x, torch.float8_e5m2, None, fp8_max=240.0)
    assert numbers.float().flatten().tolist() == [320.0, -57344.0]


@pytest.mark.parametrize("dtype", [*FLOAT8, torch.int8])
def test_a_nan_stays_one_and_in_its_head(dtype: torch.dtype) -> None:
    x = torch.tensor([[[math.nan, 1.0], [1.0, 0.5]]])
    found = widen(*narrow(x, dtype, None), None)
    assert found[0, 0, 0].isnan()
    assert torch.allclose(found[0, 1], x[0, 1], atol=0.01)


def test_wider_dtypes_are_only_cast() -> None:
    x = torch.randn(3, 2, 4)
    numbers, scales = narrow(x, torch.bfloat16, torch.tensor(2.0))
    assert scales is None
    assert torch.equal(numbers, x.bfloat16())
    assert widen(numbers, None, torch.tensor(2.0)) is numbers
