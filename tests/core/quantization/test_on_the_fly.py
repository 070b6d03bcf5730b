from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chipset.core.models.families import FAMILIES
from chipset.core.quantization.canonical import dequantise
from chipset.core.quantization.on_the_fly import OnTheFlyScheme

from .test_canonical import assert_canonical
from .test_formats import MODULE, weight

Kind = Literal["int8", "int4", "fp8"]


@given(
    kind=st.sampled_from(["int8", "int4", "fp8"]),
    columns=st.sampled_from([16, 32, 64, 96, 192, 6]),
    seed=st.integers(0, 99),
)
def test_every_number_is_the_nearest_there_is(kind: Kind, columns: int, seed: int) -> None:
    plain = weight(8, columns, seed)
    packed = OnTheFlyScheme(kind).pack(MODULE, {"weight": plain})
    assert_canonical(packed)
    size = packed.format.group_size or columns
    scale = packed.tensors["scale"].repeat_interleave(size, 1)
    error = (dequantise(packed) - plain).abs()
    if kind == "fp8":
        # half of 1/8 of the number, or of the smallest step there is
        allowed = torch.maximum(plain.abs() / 16, scale * 2**-10)
    else:
        # half a step; int4 ends a step before what would be opposite to its extreme
        allowed = scale.abs() * (0.5 if kind == "int8" else 1.0)
    assert bool((error <= allowed * 1.001).all())
    assert not dequantise(packed)[4].any(), "what is 0 stays 0"


@pytest.mark.parametrize(
    ("columns", "size"), [(576, 64), (1536, 64), (96, 32), (48, 16), (64, None), (6, None)]
)
def test_int4_has_groups_that_divide_a_row(columns: int, size: int | None) -> None:
    packed = OnTheFlyScheme("int4").pack(MODULE, {"weight": weight(8, columns)})
    assert packed.format.group_size == size


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_inputs_are_meant_to_be_quantised_by_token(kind: Kind) -> None:
    packed = OnTheFlyScheme(kind).pack(MODULE, {"weight": weight()})
    assert packed.format.activation == "dynamic_token"


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_heads_embeddings_and_routers_of_every_family_stay_plain(kind: Kind) -> None:
    scheme = OnTheFlyScheme(kind)
    for family in FAMILIES.values():
        names, layer = family.names, f"{family.names.prefix}{family.names.layer}3."
        plain = [f"{names.prefix}{names.embedding}", names.head]
        plain += [layer + names.router] if names.router else []
        others = [layer + name for name in (*names.qkv, names.o, *names.gate_up, names.down)]
        assert not any(scheme.stored(module, 64, 64) for module in plain)
        assert all(scheme.stored(module, 64, 64) for module in others)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    plain = weight()
    plain[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"^weight holds nan or infinity"):
        OnTheFlyScheme("int8").pack(MODULE, {"weight": plain})
