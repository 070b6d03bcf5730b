from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from chipset.backends.formats import Packed
from chipset.backends.quantization import WeightFormat
from chipset.core.quantization import canonical
from chipset.core.quantization.canonical import dequantise

from .weights import FORMS, weight, weights

DTYPES = {"int4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
NAMES = [" ".join(str(part) for part in form.values()) for form in FORMS]


def assert_canonical(packed: Packed) -> None:
    """Shapes and dtypes are what WeightFormat says, with nothing else beside."""
    form, tensors = packed.format, packed.tensors
    lead, rows, width = (
        tensors["weight"].shape[:-2],
        tensors["weight"].shape[-2],
        tensors["weight"].shape[-1],
    )
    columns = width * (2 if form.kind == "int4" else 1)
    wanted = {"weight": (tensors["weight"].dtype, (*lead, rows, width))}
    if form.kind != "plain":
        assert tensors["weight"].dtype == DTYPES[form.kind]
        grid = (rows, 1)
        if form.group_size is not None:
            assert columns % form.group_size == 0
            grid = (rows, columns // form.group_size)
        if form.block is not None:
            grid = (ceil(rows / form.block[0]), ceil(columns / form.block[1]))
        wanted["scale"] = (torch.float32, (*lead, *grid))
        if form.zero_points != "none":
            wanted["zero_point"] = wanted["scale"]
        if form.permuted:
            wanted["order"] = (torch.int32, (*lead, columns))
        if form.activation == "static_tensor":
            wanted["input_scale"] = (torch.float32, tuple(lead))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == wanted


def same(found: Packed, wanted: Tensor) -> None:
    assert_canonical(found)
    assert torch.equal(dequantise(found), wanted)


def one_by_one(packed: Packed) -> Tensor:
    """What WeightFormat's table says of each number of one weight, without any haste."""
    form, tensors = packed.format, packed.tensors
    rows, width = tensors["weight"].shape
    columns = width * 2 if form.kind == "int4" else width
    out = torch.zeros(rows, columns + 1)
    for row in range(rows):
        for column in range(columns):
            if form.kind == "int4":
                octet = int(tensors["weight"][row, column // 2])
                number = float(octet >> 4 if column % 2 else octet & 15)
            else:
                number = float(tensors["weight"][row, column])
            if form.kind != "plain":
                cell = (row, column // form.group_size if form.group_size else 0)
                if form.block:
                    cell = (row // form.block[0], column // form.block[1])
                middle = torch.tensor(8.0 if form.kind == "int4" else 0.0)
                middle = tensors["zero_point"][cell] if "zero_point" in tensors else middle
                number = float(tensors["scale"][cell] * (number - middle))
            out[row, int(tensors["order"][column]) if form.permuted else column] = number
    return out[:, : canonical.in_features(packed)]


@given(weights(experts=False))
def test_dequantise_reads_each_number_as_the_contract_says(packed: Packed) -> None:
    same(packed, one_by_one(packed))


@given(weights(), st.data())
def test_a_cut_weight_is_the_cut_of_the_weight(packed: Packed, data: st.DataObject) -> None:
    rows, columns = canonical.num_rows(packed), canonical.in_features(packed)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    bottom = data.draw(st.integers(top + 1, rows))
    right = data.draw(st.integers(left + 1, columns))
    assume(packed.format.kind != "int4" or packed.format.permuted or (right - left) % 2 == 0)
    found = canonical.cut(packed, slice(top, bottom), slice(left, right))
    same(found, dequantise(packed)[..., top:bottom, left:right])
    whole = (top, bottom, left, right) == (0, rows, 0, columns)
    for name, tensor in found.tensors.items():
        alone = tensor.untyped_storage().nbytes() == tensor.nbytes
        assert alone or whole, f"{name} keeps the whole weight alive"


@given(weights(), st.data())
def test_a_part_of_a_part_is_a_part(packed: Packed, data: st.DataObject) -> None:
    columns = canonical.in_features(packed)
    middle = data.draw(st.integers(0, columns // 2 - 1)) * 2
    outer = canonical.cut(packed, slice(None), slice(middle, None))
    end = data.draw(st.integers(1, (columns - middle) // 2)) * 2
    same(
        canonical.cut(outer, slice(None), slice(0, end)),
        dequantise(packed)[..., middle : middle + end],
    )


@given(weights(), st.integers(0, 5), st.integers(0, 40))
def test_what_pad_adds_is_worth_nothing(packed: Packed, below: int, behind: int) -> None:
    is_even = packed.format.kind != "int4" or packed.format.permuted
    behind = behind if is_even and packed.format.kind != "int4" else behind // 2 * 2
    rows, columns = canonical.num_rows(packed) + below, canonical.in_features(packed) + behind
    found = canonical.pad(packed, rows, columns)
    same(found, torch.nn.functional.pad(dequantise(packed), (0, behind, 0, below)))


@given(weights(), st.lists(st.integers(0, 100), min_size=1, max_size=12))
def test_rows_are_taken_in_any_order(packed: Packed, index: list[int]) -> None:
    rows = torch.tensor(index) % canonical.num_rows(packed)
    same(canonical.take_rows(packed, rows), dequantise(packed).index_select(-2, rows))


@given(st.data())
def test_weights_of_one_kind_are_joined_whatever_their_groups(data: st.DataObject) -> None:
    kind, activation = data.draw(
        st.sampled_from([("int4", "none"), ("int8", "none"), ("fp8", "none"), ("plain", "none")])
    )
    forms = [
        form
        for form in FORMS
        if form["kind"] == kind
        and not form.get("permuted")
        and form.get("activation", "none") == activation
    ]
    parts = []
    for _ in range(data.draw(st.integers(1, 4))):
        form, seed = data.draw(st.sampled_from(forms)), data.draw(st.integers(0, 99))
        size = data.draw(st.sampled_from([4, 8, 12]))
        whole = weight(form, data.draw(st.integers(1, 7)), 48 // size, size, seed)
        parts.append(canonical.cut(whole, slice(None), slice(0, 40)))
    found = canonical.join_rows(parts)
    assert found is not None
    same(found, torch.cat([dequantise(part) for part in parts]))


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_halves_joined_are_the_whole(form: dict[str, object]) -> None:
    whole = weight(form, rows=8, groups=4, size=8, seed=1)
    found = canonical.join_rows(
        [canonical.cut(whole, rows, slice(None)) for rows in (slice(0, 5), slice(5, 8))]
    )
    assert found is not None
    same(found, dequantise(whole))
    if whole.format.block is None:
        assert found.format == whole.format, "what was cut between groups has the same groups"


def test_blocks_that_end_where_the_next_begin_keep_their_size() -> None:
    parts = [weight(FORMS[11], rows=6, groups=2, size=8, seed=seed) for seed in range(3)]
    found = canonical.join_rows(parts)
    assert found is not None
    assert found.format.block == (3, 8)


def test_weights_of_different_kinds_are_not_joined() -> None:
    parts = [weight({"kind": kind}, 4, 2, 8, 1) for kind in ("int4", "int8")]
    assert canonical.join_rows(parts) is None


def test_weights_of_different_orders_are_not_joined() -> None:
    permuted = {"kind": "int4", "permuted": True}
    assert canonical.join_rows([weight(permuted, 4, 2, 8, seed) for seed in (1, 2)]) is None
    plain = weight({"kind": "int4"}, 4, 2, 8, 1)
    assert canonical.join_rows([weight(permuted, 4, 2, 8, 1), plain]) is None


def test_the_largest_of_several_input_scales_is_taken() -> None:
    parts = [weight(FORMS[13], 4, 1, 8, seed) for seed in (1, 2, 3)]
    found = canonical.join_rows(parts)
    assert found is not None
    assert found.tensors["input_scale"] == max(part.tensors["input_scale"] for part in parts)


def experts_of(form: dict[str, object]) -> Sequence[Packed]:
    return [weight(form, rows=6, groups=3, size=8, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_experts_are_stacked(form: dict[str, object]) -> None:
    experts = experts_of(form)
    same(canonical.stack(experts), torch.stack([dequantise(expert) for expert in experts]))


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_parts_of_experts_are_stacked(form: dict[str, object]) -> None:
    """With orders of their own, they have different numbers of columns in each group."""
    parts = [canonical.cut(expert, slice(1, 5), slice(4, 14)) for expert in experts_of(form)]
    same(canonical.stack(parts), torch.stack([dequantise(part) for part in parts]))


def test_experts_with_and_without_zero_points_are_stacked() -> None:
    experts = [weight(form, 4, 2, 8, 1) for form in FORMS[1:4]]
    found = canonical.stack(experts)
    assert found.format.zero_points == "real"
    same(found, torch.stack([dequantise(expert) for expert in experts]))


def test_experts_of_different_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="fp8, int4"):
        canonical.stack([weight({"kind": kind}, 4, 2, 8, 1) for kind in ("int4", "fp8")])


@pytest.mark.parametrize("num_parts", [2, 4])
def test_a_rank_holds_little_more_than_its_part_of_a_permuted_weight(num_parts: int) -> None:
    whole = weight({"kind": "int4", "permuted": True}, rows=16, groups=8, size=128, seed=3)
    width = 1024 // num_parts
    for part in range(num_parts):
        held = canonical.cut(whole, slice(None), slice(part * width, (part + 1) * width))
        assert held.format.group_size == 32
        # half a piece of 32 is lost in each of the 8 groups
        assert held.tensors["order"].numel() <= width + 8 * 24


def test_whole_groups_of_a_permuted_weight_stay_whole() -> None:
    whole = weight({"kind": "int4", "permuted": True}, rows=4, groups=4, size=8, seed=3)
    order = torch.arange(32, dtype=torch.int32).roll(8)
    whole = Packed(format=whole.format, tensors={**whole.tensors, "order": order})
    found = canonical.cut(whole, slice(None), slice(0, 16))
    assert found.format == whole.format
    same(found, dequantise(whole)[:, :16])


def test_an_odd_part_of_int4_is_refused() -> None:
    with pytest.raises(ValueError, match="3 columns of int4"):
        canonical.cut(weight(FORMS[1], 4, 2, 8, 1), slice(None), slice(0, 3))


def test_an_empty_part_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        canonical.cut(weight(FORMS[1], 4, 2, 8, 1), slice(2, 2), slice(None))


def test_the_kind_of_a_plugin_is_refused_by_name() -> None:
    strange = Packed(format=WeightFormat(kind="ternary"), tensors={"trits": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match="ternary"):
        canonical.cut(strange, slice(0, 1), slice(None))
