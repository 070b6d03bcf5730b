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
from .product import SLICE_STEP, Product
from .scratch import Scratch

INT4_GROUPS = (32, 64, 128, 256)
"""What torch's check lets through."""
INT4_FEW = 32
"""Rows of the input up to which torch's product is the faster one."""
INT4_ROWS = 16
"""Outputs that are packed together."""
INT8_COLUMNS = 32
"""A vector of the widest CPUs; without a whole number of them the product reads beyond the weight."""
INT8_FEW = 8
"""Rows of the input up to which it is the faster one."""


class Int4Weight(nn.Module):
    """torch's int4 product: bfloat16 only, scales and zeros too, which rounds weights as a plain one is rounded.

    Many rows are multiplied by the same numbers, widened, where torch's layout of them is one that is known.
    """

    numbers: Tensor
    """u8 [N, K / 2] as torch lays them out for this CPU"""
    scale_zero: Tensor
    """bf16 [K / group, N, 2]: a number q is worth (q - 8) * scale + zero"""
    order: Tensor | None

    def __init__(
        self,
        weight_format: WeightFormat,
        tensors: Mapping[str, Tensor],
        product: Product,
        codes: Scratch,
    ) -> None:
        super().__init__()
        assert weight_format.group_size is not None
        self.group_size = weight_format.group_size
        self.product, self.codes = product, codes
        # of the rounded scale, so that a number that equals its zero point is worth 0 but for one rounding
        scale = tensors["scale"].bfloat16()
        zero = torch.zeros_like(scale)
        if "zero_point" in tensors:
            zero = ((8 - tensors["zero_point"]) * scale.float()).bfloat16()
        self.num_rows = len(scale)
        self.tile = tile_rows()
        self.register_buffer("numbers", packed_for_this_cpu(unpacked(tensors["weight"])))
        self.register_buffer("scale_zero", torch.stack((scale.T, zero.T), -1).contiguous())
        self.register_buffer("order", tensors.get("order"))

    def forward(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        """x [T, in_features] in bfloat16 -> [T, N]."""
        x = in_order(x, self.order)
        if x.shape[0] > INT4_FEW and self.tile is not None and self.num_rows % self.tile == 0:
            return self.product.widened(x, self.num_rows, self.widen, out_dtype)
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.numbers, self.group_size, self.scale_zero
        )
        return out

    def widen(self, first: int, wide: Tensor) -> None:
        """See Widen: turned bytes are the rows of a tile's first half, in their low halves, and of its second."""
        assert self.tile is not None
        half, (count, num_columns) = self.tile // 2, wide.shape
        tiles = self.numbers.view(-1, num_columns, half)[first // self.tile :][: count // self.tile]
        scratch = self.codes.take((count + count // 2, num_columns), torch.uint8)
        turned = scratch[count:].view(-1, half, num_columns).copy_(tiles.transpose(1, 2))
        codes = scratch[:count].view(-1, 2, half, num_columns)
        torch.bitwise_and(turned, 15, out=codes[:, 0])
        torch.bitwise_right_shift(turned, 4, out=codes[:, 1])
        wide.copy_(scratch[:count].sub_(8).view(torch.int8))
        scale, zero = self.scale_zero[:, first : first + count].float().permute(2, 1, 0)[..., None]
        wide.view(count, -1, self.group_size).mul_(scale).add_(zero)


def packed_for_this_cpu(codes: Tensor) -> Tensor:
    """u8 [N, K / 2] of codes [N, K]: which halves of which bytes they are is the affair of torch's kernels."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return packed


def tile_rows() -> int | None:
    """How many rows torch packs together: the first half of them in the low halves of bytes, [tiles, K, rows / 2].

    Found by trial, for the kernels for AVX2 take 32 and those for AVX512 take 64. None where it is neither.
    """
    codes = (torch.arange(SLICE_STEP * 16) ** 2 // 7 % 16).to(torch.uint8).view(SLICE_STEP, 16)
    packed = packed_for_this_cpu(codes)
    for size in (64, 32):
        tiles = packed.view(-1, 16, size // 2).transpose(1, 2)
        if torch.equal(torch.cat((tiles & 15, tiles >> 4), 1).reshape(codes.shape), codes):
            return size
    return None


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
