"""Weights that stay packed and are widened slice by slice, in cache, for each product.

Seven passes over a slice in cache cost about as much as one row of a float32 product, so they vanish in steps of many
rows. What torch 2.13 has of its own was measured beside it, 1,536 x 576 weights on an AVX2 core, and is taken where it
is right and faster (see .packed_library). Not taken:
    _scaled_mm (fp8)            6 ms a call, for it widens the whole weight by itself; 0.5 ms here
    _int_mm                     0.6 ms a row and more
    onednn.qlinear_pointwise    wrong by a fifth of the largest output: without VNNI pairs of products saturate
    _dyn_quant_matmul_4bit      1.6 ms a row, and four times the memory that it should take
    copy of fp8 to float32      4.5 ms; by way of float16's bits 0.3 ms
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...backends.quantization import WeightFormat
from ...backends.reference.packed import in_order
from .product import Product
from .scratch import Scratch

FP8_IN_HALF = 2.0**8
"""An fp8 number is this many times the float16 that has its exponent and mantissa, in the same places, as its bits."""
FP8_BITS = 0b1011_1111_1000_0000 - 2**16
"""Of int16: the sign, and the seven that float8_e4m3fn has beside it, as far up as float16 has its own."""


class WidenedWeight(nn.Module):
    """x [T, in_features] -> [T, N] by a weight in canonical form."""

    numbers: Tensor
    """int4: u8 [N / 2, K], see `halves`; int8, fp8: as they were"""
    scale: Tensor
    """f32 [N, groups of columns]"""
    zero: Tensor | None
    """of scale's shape: u8 where all are whole numbers of int4's, else f32"""
    order: Tensor | None

    def __init__(
        self,
        weight_format: WeightFormat,
        tensors: Mapping[str, Tensor],
        product: Product,
        codes: Scratch,
    ) -> None:
        super().__init__()
        self.kind = weight_format.kind
        self.product, self.codes = product, codes
        numbers = tensors["weight"]
        self.num_rows, num_columns = numbers.shape
        if self.kind == "int4":
            num_columns *= 2
            numbers = halves(unpacked(numbers), product.slice_rows(num_columns))
        self.group_size = columns_of_a_scale(weight_format, num_columns)
        scale = by_row(tensors["scale"], weight_format, self.num_rows)
        zero = tensors.get("zero_point")
        if zero is not None:
            zero = by_row(zero, weight_format, self.num_rows)
            if self.kind == "int4" and bool(((zero == zero.round()) & (zero.abs() < 100)).all()):
                zero = zero.to(torch.int8).view(torch.uint8)
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale * FP8_IN_HALF if self.kind == "fp8" else scale)
        self.register_buffer("zero", zero)
        self.register_buffer("order", tensors.get("order"))

    def forward(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        """See Product.widened for the dtype that comes out."""
        x = in_order(x, self.order)
        out = self.product.widened(x, self.num_rows, self.widen, out_dtype)
        return out if self.scale.shape[1] > 1 else out * self.scale[:, 0]

    def widen(self, first: int, wide: Tensor) -> None:
        """See Widen; a scale of the whole row is left out, for the output takes it with less work."""
        rows = slice(first, first + len(wide))
        if self.kind == "int4":
            wide.copy_(self._int4(rows))
        elif self.kind == "int8":
            wide.copy_(self.numbers[rows])
        else:
            wide.copy_(self._half(self.numbers[rows]))
        if self.zero is not None and self.zero.dtype == torch.float32:
            for part, zero in self._groups(wide, self.zero[rows]):
                part.sub_(zero)
        if self.scale.shape[1] > 1:
            for part, scale in self._groups(wide, self.scale[rows]):
                part.mul_(scale)

    def _int4(self, rows: slice) -> Tensor:
        """i8 [n, K] of a slice, less those zero points that are whole."""
        count = rows.stop - rows.start
        packed = self.numbers[rows.start // 2 : (rows.stop + 1) // 2]
        codes = self.codes.take((2, *packed.shape), torch.uint8)
        torch.bitwise_and(packed, 15, out=codes[0])
        torch.bitwise_right_shift(packed, 4, out=codes[1])
        codes = codes.view(-1, packed.shape[1])[:count]
        if self.zero is None:
            codes.sub_(8)
        elif self.zero.dtype == torch.uint8:
            for part, zero in self._groups(codes, self.zero[rows]):
                part.sub_(zero)
        return codes.view(torch.int8)

    def _half(self, numbers: Tensor) -> Tensor:
        """f16 of fp8 numbers / FP8_IN_HALF, exactly."""
        bits = self.codes.take(tuple(numbers.shape), torch.int16)
        bits.copy_(numbers.view(torch.int8))
        return bits.bitwise_left_shift_(7).bitwise_and_(FP8_BITS).view(torch.float16)

    def _groups(self, wide: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of `wide` [n, K] by groups, each with its values, which broadcast; the last group may be short."""
        size = self.group_size
        whole = wide.shape[1] // size
        even = wide[:, : whole * size].view(len(wide), whole, size)
        parts = [(even, values[:, :whole, None])]
        if whole < values.shape[1]:
            parts.append((wide[:, whole * size :], values[:, whole:]))
        return parts if whole else parts[1:]


def unpacked(weight: Tensor) -> Tensor:
    """u8 [N, K] of int4's u8 [N, K / 2]."""
    return torch.stack((weight & 15, weight >> 4), -1).flatten(-2)


def halves(codes: Tensor, slice_rows: int) -> Tensor:
    """u8 [ceil(N / 2), K] of codes [N, K]: of each slice the first rows in the low halves, the others in the high.

    So each half is widened to rows that lie side by side, whatever the columns.
    """
    found: list[Tensor] = []
    for part in torch.split(codes, slice_rows):
        low, high = part[: (len(part) + 1) // 2], part[(len(part) + 1) // 2 :]
        packed = low.clone()
        packed[: len(high)] |= high << 4
        found.append(packed)
    return torch.cat(found)


def by_row(values: Tensor, weight_format: WeightFormat, num_rows: int) -> Tensor:
    """f32 [N, groups of columns] of a scale or zero point of any layout."""
    if weight_format.block is None:
        return values
    return values.repeat_interleave(weight_format.block[0], 0)[:num_rows]


def columns_of_a_scale(weight_format: WeightFormat, num_columns: int) -> int:
    """How many columns of a row share one."""
    if weight_format.block is not None:
        return weight_format.block[1]
    return weight_format.group_size or num_columns
