"""What the kit takes packed weights to be worth, by hand, and how far it lets rounded inputs take outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chipset.backends.conformance.packed_weights import (
    FORMATS,
    QUICK,
    format_name,
    input_slack,
    make_packed,
    worth,
)
from chipset.backends.quantization import WeightFormat


def test_int4_has_even_columns_in_the_low_half_and_8_for_zero() -> None:
    tensors = {"weight": torch.tensor([[0xF8, 0x10]]).byte(), "scale": torch.tensor([[1.0, 10.0]])}
    found = worth(WeightFormat(kind="int4", group_size=2), tensors, 4)
    assert found.tolist() == [[0, 7, -80, -70]]


def test_a_zero_point_belongs_to_its_group() -> None:
    form = WeightFormat(kind="int8", group_size=2, zero_points="real")
    tensors = {
        "weight": torch.tensor([[-128, 127, 1, 2]], dtype=torch.int8),
        "scale": torch.tensor([[1.0, 2.0]]),
        "zero_point": torch.tensor([[1.0, -0.5]]),
    }
    assert worth(form, tensors, 4).tolist() == [[-129, 126, 3, 5]]


def test_fp8_is_read_from_its_bits() -> None:
    codes = torch.tensor([[0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0xFE, 0x81]]).byte()
    tensors = {"weight": codes.view(torch.float8_e4m3fn), "scale": torch.tensor([[2.0]])}
    found = worth(WeightFormat(kind="fp8"), tensors, 8)
    least = 2.0**-9
    assert (found / 2).tolist() == [[0, least, 7 * least, 8 * least, 1, 448, -448, -least]]


def test_a_block_ends_with_the_weight() -> None:
    form = WeightFormat(kind="int8", block=(2, 3))
    tensors = {
        "weight": torch.ones(3, 4, dtype=torch.int8),
        "scale": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    }
    assert worth(form, tensors, 4).tolist() == [[1, 1, 1, 2], [1, 1, 1, 2], [3, 3, 3, 4]]


def test_a_permuted_column_multiplies_the_input_that_order_names() -> None:
    form = WeightFormat(kind="int8", group_size=2, permuted=True)
    tensors = {
        "weight": torch.tensor([[1, 2, 3, 4]], dtype=torch.int8),
        "scale": torch.tensor([[1.0, 10.0]]),
        "order": torch.tensor([2, 3, 0, 1], dtype=torch.int32),
    }
    assert worth(form, tensors, 4).tolist() == [[30, 40, 1, 2]]
    assert worth(form, tensors, 3).tolist() == [[30, 40, 1]]


@pytest.mark.parametrize("form", FORMATS, ids=format_name)
def test_what_is_made_is_canonical(form: WeightFormat) -> None:
    tensors = make_packed(form, 144, 256, largest_input=4.0)
    columns = 256 + (form.group_size or 0) * form.permuted
    assert tensors["weight"].shape == (144, columns // (2 if form.kind == "int4" else 1))
    assert ("zero_point" in tensors) == (form.zero_points != "none")
    assert ("order" in tensors) == form.permuted
    assert ("input_scale" in tensors) == (form.activation == "static_tensor")
    if form.permuted:
        order = tensors["order"].numpy()
        assert sorted(order[order < 256]) == list(range(256))
    weight = worth(form, tensors, 256)
    assert 0.3 < np.sqrt((weight**2).sum(1)[3:-16].mean()) < 3


def test_there_are_no_two_of_a_format_and_none_without_a_quick_one() -> None:
    assert len(set(FORMATS)) == len(FORMATS)
    assert {form.kind for form in QUICK} == {form.kind for form in FORMATS}


@given(seed=st.integers(0, 2**16), kind=st.sampled_from(["int8", "fp8"]), static=st.booleans())
def test_an_input_rounded_as_its_format_says_stays_within_the_bound(
    seed: int, kind: str, static: bool
) -> None:
    draw = np.random.default_rng(seed)
    form = WeightFormat(kind=kind, activation="static_tensor" if static else "dynamic_token")
    x, weight = draw.normal(size=(4, 24)) * draw.uniform(0.1, 9, (4, 1)), draw.normal(size=(5, 24))
    largest = np.abs(x).max() if static else np.abs(x).max(1, keepdims=True)
    for most in (127.0,) if kind == "int8" else (448.0, 240.0):
        scaled = torch.from_numpy(x / (largest / most))
        rounded = scaled.round() if kind == "int8" else scaled.float().to(torch.float8_e4m3fn)
        off = np.abs((rounded.double().numpy() * (largest / most) - x) @ weight.T)
        assert (off <= input_slack(form, x, weight)).all()


def test_an_input_that_is_not_quantised_has_no_slack() -> None:
    x = np.ones((2, 3))
    assert not input_slack(WeightFormat(kind="int4"), x, np.ones((4, 3))).any()
