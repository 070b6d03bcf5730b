"""Layers that no tool has written: the error names the tensor and what it should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from quantizers import Recipe, awq_recipe, fp8_recipe, gptq_recipe
from torch import Tensor

from .test_formats import MODULE, scheme, weight

AWQ, GPTQ = awq_recipe(64), gptq_recipe(64)
DESC_ACT = gptq_recipe(64, desc_act=True)
NAN = torch.tensor(float("nan"))


def packing(recipe: Recipe, **changed: Tensor | None) -> None:
    """Pack a layer some of whose tensors are others, or missing."""
    tensors: Mapping[str, Any] = {**recipe.layer(weight(), 8.0).tensors, **changed}
    scheme(recipe).pack(MODULE, {name: t for name, t in tensors.items() if t is not None})


def with_nan(recipe: Recipe, name: str) -> Tensor:
    tensor = recipe.layer(weight(), 8.0).tensors[name].clone()
    tensor.view(-1)[-1] = NAN
    return tensor


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        *((AWQ, name) for name in ("qweight", "qzeros", "scales")),
        *((DESC_ACT, name) for name in ("qweight", "qzeros", "scales", "g_idx")),
        (fp8_recipe("layer"), "weight_scale"),
        (fp8_recipe("row"), "weight_scale"),
        (fp8_recipe((128, 128)), "weight_scale_inv"),
        (fp8_recipe("layer", static=True), "input_scale"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_missing_tensor_is_named(recipe: Recipe, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}\b.* missing"):
        packing(recipe, **{name: None})


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (AWQ, "scales"),
        (GPTQ, "scales"),
        (fp8_recipe("layer"), "weight_scale"),
        (fp8_recipe("row"), "weight_scale"),
        (fp8_recipe((128, 128)), "weight_scale_inv"),
        (fp8_recipe("layer", static=True), "input_scale"),
        (fp8_recipe("layer"), "weight"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_nan_is_refused(recipe: Recipe, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} holds nan"):
        packing(recipe, **{name: with_nan(recipe, name)})


def test_awq_of_another_group_size_is_refused() -> None:
    other = awq_recipe(128).layer(weight(), 8.0).tensors
    with pytest.raises(ValueError, match=r"^qzeros has the shape \[3, 96\].* \[6, 96\]"):
        packing(AWQ, qzeros=other["qzeros"], scales=other["scales"])


def test_awq_whose_rows_are_no_groups_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^qweight has 100 rows, which are no groups of 64"):
        packing(AWQ, qweight=torch.zeros(100, 12, dtype=torch.int32))


def test_gptq_of_another_group_size_is_refused() -> None:
    other = gptq_recipe(128).layer(weight(), 8.0).tensors
    with pytest.raises(ValueError, match=r"^scales has 3 rows.* 384 inputs in groups of 64"):
        packing(GPTQ, qzeros=other["qzeros"], scales=other["scales"])


def test_gptq_whose_tensors_have_different_outputs_is_refused() -> None:
    other = GPTQ.layer(weight(64), 8.0).tensors
    with pytest.raises(ValueError, match=r"^scales has the shape \[6, 64\].*\[6, 96\]"):
        packing(GPTQ, scales=other["scales"])
    with pytest.raises(ValueError, match=r"^qzeros has the shape \[6, 64\].*\[6, 96\]"):
        packing(GPTQ, qzeros=other["qzeros"])


@pytest.mark.parametrize("group", [-1, 6, 2**31 - 1])
def test_g_idx_beyond_the_groups_is_refused(group: int) -> None:
    order = DESC_ACT.layer(weight(), 8.0).tensors["g_idx"].clone()
    order[5] = group
    with pytest.raises(ValueError, match=r"^g_idx holds groups beyond 0 to 5"):
        packing(DESC_ACT, g_idx=order)


def test_g_idx_in_an_order_that_config_json_denies_is_refused() -> None:
    order = DESC_ACT.layer(weight(), 8.0).tensors["g_idx"]
    with pytest.raises(ValueError, match=r"^g_idx .* desc_act false"):
        packing(GPTQ, g_idx=order)


def test_fp8_blocks_of_another_size_are_refused() -> None:
    scales = torch.ones(2, 6)
    with pytest.raises(ValueError, match=r"^weight_scale_inv has the shape \[2, 6\].*\[1, 3\]"):
        packing(fp8_recipe((128, 128)), weight_scale_inv=scales)


def test_two_scales_of_one_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="weight_scale and weight_scale_inv are both there"):
        packing(fp8_recipe("layer"), weight_scale_inv=torch.ones(()))


def test_several_scales_where_one_belongs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^weight_scale has the shape \[3\]"):
        packing(fp8_recipe("layer"), weight_scale=torch.ones(3))
