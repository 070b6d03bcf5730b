"""Blocks of 32 numbers as GGUF files store them, for the types whose blocks are canonical groups:

    Q4_0    f16 d, 16 bytes           d * (q - 8)
    Q4_1    f16 d, f16 m, 16 bytes    d * q + m
    Q8_0    f16 d, 32 bytes           d * q

Of 16 bytes the low halves are numbers 0 to 15, the high ones 16 to 31. Source: ggml's ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ...backends.formats import Axis, Packed, Scheme, StoredTensor
from ...backends.quantization import WeightFormat
from .checks import finite, stored
from .numbers import join_nibbles

BLOCK: Final = 32
BLOCK_BYTES: Final[Mapping[str, int]] = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Types that stay packed; others are decoded while loading."""


class GgmlScheme(Scheme):
    """Of one file. `kinds`: the type of each layer's weight, by ggml's names; others than BLOCK_BYTES has are plain."""

    name = "gguf"

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self._kinds = kinds

    def stored(
        self,
        module: str,
        in_features: int,  # noqa: ARG002 - axes are told by features
        out_features: int,  # noqa: ARG002
    ) -> Mapping[str, StoredTensor] | None:
        """See Scheme.stored."""
        size = BLOCK_BYTES.get(self._kinds.get(module, ""))
        if size is None:
            return None
        axes = (Axis(of="out"), Axis(of="in", features=BLOCK), Axis(of="none", size=size))
        return {"weight": StoredTensor(dtypes=("uint8",), axes=axes)}

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:
        """See Scheme.pack."""
        blocks, kind = stored(tensors, "weight"), self._kinds[module]
        if blocks.dim() != 3 or blocks.shape[2] != BLOCK_BYTES[kind]:
            raise ValueError(
                f"weight has the shape {list(blocks.shape)} where {kind} asks for blocks of {BLOCK_BYTES[kind]} bytes"
            )
        found = {"scale": _half(blocks[..., :2])}
        if kind == "Q8_0":
            found["weight"] = blocks[..., 2:].contiguous().view(torch.int8).flatten(1)
        else:
            octets = blocks[..., -BLOCK // 2 :]
            numbers = torch.cat((octets & 15, octets >> 4), -1)
            if kind == "Q4_1":
                minimum = _half(blocks[..., 2:4])
                is_flat = found["scale"] == 0
                # all of a flat block are its minimum: minimum * (0 - -1)
                numbers.masked_fill_(is_flat[..., None], 0)
                zero = torch.where(is_flat, -1.0, -minimum / found["scale"])
                found["scale"] = torch.where(is_flat, minimum, found["scale"])
                found["zero_point"] = zero
            found["weight"] = join_nibbles(numbers.flatten(1))
        form = WeightFormat(
            kind="int8" if kind == "Q8_0" else "int4",
            group_size=BLOCK if blocks.shape[1] > 1 else None,
            zero_points="real" if kind == "Q4_1" else "none",
        )
        return Packed(format=form, tensors=found)


def _half(octets: Tensor) -> Tensor:
    """u8 [N, B, 2] -> f32 [N, B]"""
    return finite("weight", octets.contiguous().view(torch.float16).squeeze(-1))
