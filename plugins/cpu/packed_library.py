"""Torch's own products with packed weights, and what each asks of a layer.

On an AVX2 core, 1,536 x 576 weights, bfloat16 (both are ten times slower in float32):
    rows                       1      8       64
    _weight_int4pack_mm      0.15   0.55    4.0 ms
    _weight_int8pack_mm      0.11   0.35    2.9
    widened in cache         0.5    0.8     2.1
    the plain weight         0.2    1.9    12      and 2.1 where it is widened
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...backends.quantization import LinearSpec, Verdict, WeightFormat
from ...backends.reference.packed import in_order
from .packed import WidenedWeight, unpacked

INT4_GROUPS = (32, 64, 128, 256)
"""What torch's check lets through."""
INT4_ROWS = 16
"""Outputs that are packed together."""
INT8_COLUMNS = 32
"""A vector of the widest CPUs; without a whole number of them the product reads beyond the weight."""
INT8_FEW = 8
"""Rows of the input up to which it is the faster one."""


class Int4Weight(nn.Module):
    """torch's int4 product: bfloat16 only, scales and zeros too, which rounds weights as a plain one is rounded."""

    numbers: Tensor
    """u8 [N, K / 2] as torch lays them out for this CPU"""
    scale_zero: Tensor
    """bf16 [K / group, N, 2]: a number q is (q - 8) * scale + zero"""
    order: Tensor | None

    def __init__(self, weight_format: WeightFormat, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        assert weight_format.group_size is not None
        self.group_size = weight_format.group_size
        codes = unpacked(tensors["weight"]).to(torch.int32)
        scale = tensors["scale"].bfloat16()
        # of the rounded scale, so that a number that equals its zero point is worth 0 but for one rounding
        zero = torch.zeros_like(scale)
        if "zero_point" in tensors:
            zero = ((8 - tensors["zero_point"]) * scale.float()).bfloat16()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.register_buffer("numbers", packed)
        self.register_buffer("scale_zero", torch.stack((scale.T, zero.T), -1).contiguous())
        self.register_buffer("order", tensors.get("order"))

    def forward(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        """x [T, in_features] -> [T, N], both bfloat16."""
        assert x.dtype == out_dtype == torch.bfloat16
        x = in_order(x, self.order).contiguous()
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.numbers, self.group_size, self.scale_zero
        )
        return out


class Int8Weight(WidenedWeight):
    """torch's int8 product for few rows; many are multiplied by the same numbers, widened."""

    def forward(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        """x [T, in_features] in bfloat16 -> [T, N]."""
        if x.shape[0] > INT8_FEW:
            return super().forward(x, out_dtype)
        scale = self.scale[:, 0].to(x.dtype)
        out: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.numbers, scale)
        return out


def int4_verdict(spec: LinearSpec) -> Verdict:
    """Whether Int4Weight takes a layer."""
    weight, name = spec.weight, "torch int4 packed"
    if not spec.dtype == spec.out_dtype == "bfloat16":
        reason = "torch's product is for bfloat16; it is ten times slower in float32"
    elif weight.group_size not in INT4_GROUPS:
        sizes = ", ".join(map(str, INT4_GROUPS))
        reason = f"a group must have {sizes} columns, not {weight.group_size or 'all of them'}"
    elif spec.out_features % INT4_ROWS:
        reason = f"{spec.out_features} outputs are no multiple of {INT4_ROWS}"
    else:
        return Verdict(kernel=name, ok=True, reason="bfloat16 with whole groups")
    return Verdict(kernel=name, ok=False, reason=reason)


def int8_verdict(spec: LinearSpec) -> Verdict:
    """Whether Int8Weight takes a layer."""
    weight, name = spec.weight, "torch int8 packed"
    if not spec.dtype == spec.out_dtype == "bfloat16":
        reason = "torch's product is for bfloat16; it is ten times slower in float32"
    elif weight.group_size or weight.block or weight.zero_points != "none" or weight.permuted:
        reason = "torch's product has one scale a row, no zero points and no order"
    elif spec.in_features % INT8_COLUMNS:
        reason = f"{spec.in_features} inputs are no multiple of {INT8_COLUMNS}"
    else:
        return Verdict(kernel=name, ok=True, reason="bfloat16 with a scale a row")
    return Verdict(kernel=name, ok=False, reason=reason)
