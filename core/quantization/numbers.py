"""The numbers of a weight, as they lie in memory and one by one."""

from __future__ import annotations

import torch
from torch import Tensor


def join_nibbles(numbers: Tensor) -> Tensor:
    """u8 [..., K], each from 0 to 15 -> u8 [..., K / 2], even columns in the low half."""
    if numbers.shape[-1] % 2:
        raise ValueError(f"{numbers.shape[-1]} columns of int4; there must be an even number")
    return numbers[..., 0::2] | (numbers[..., 1::2] << 4)


def split_nibbles(packed: Tensor) -> Tensor:
    """u8 [..., K / 2] -> u8 [..., K], low halves in the even columns."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def split_words(words: Tensor, bits: int) -> Tensor:
    """i32 [..., W] -> u8 [..., W * 32 / bits], the lowest bits first; `bits` is 4 or 8."""
    # a copy, for what has one row or column counts as contiguous whatever its strides are
    words = words.new_empty(words.shape).copy_(words)
    # torch serves little-endian machines only, where a word's lowest byte comes first
    octets = words.view(torch.uint8)
    return octets if bits == 8 else split_nibbles(octets)


def split_numbers(kind: str, weight: Tensor) -> Tensor:
    """[..., K] of int4 or another kind's canonical weight."""
    return split_nibbles(weight) if kind == "int4" else weight


def join_numbers(kind: str, numbers: Tensor) -> Tensor:
    """The other way."""
    return join_nibbles(numbers) if kind == "int4" else numbers


def take_columns(kind: str, weight: Tensor, columns: range) -> Tensor:
    """Of a canonical weight; a view where that can be."""
    if kind != "int4":
        return weight[..., columns.start : columns.stop]
    if columns.start % 2 or columns.stop % 2:
        return join_nibbles(split_nibbles(weight)[..., columns.start : columns.stop])
    return weight[..., columns.start // 2 : columns.stop // 2]
