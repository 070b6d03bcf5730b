"""What a cache of one byte a number holds in place of keys and values.

    float8    x / the layer's scale, saturating                        one scale a layer, from the checkpoint
    int8      round(x / s) with s = max |x| over the head / 127        one s a token and head, found while writing

s is float32: it fits whatever x may be, and costs 4 bytes beside the 64 or more of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127
"""-128 stays unused, so that x and -x are held alike."""
SCALE_DTYPE = torch.float32
"""Of the scales beside int8."""


def is_float8(dtype: torch.dtype) -> bool:
    """Whether numbers of `dtype` are worth themselves times the scale of their layer."""
    return dtype.is_floating_point and dtype.itemsize == 1


def float8_max(dtype: torch.dtype, fp8_max: float | None) -> float:
    """The largest number that is written; `fp8_max` is Capabilities.fp8_max, which speaks of e4m3 alone."""
    limit = torch.finfo(dtype).max
    return limit if fp8_max is None or dtype != torch.float8_e4m3fn else min(limit, fp8_max)


def narrow(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None, fp8_max: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """x [T, H, D] -> numbers [T, H, D] of the cache's `dtype`, and for int8 their scales f32 [T, H].

    `scale` f32 [] counts for float8 alone. What is too large becomes the largest number; a nan stays one.
    """
    if dtype == torch.int8:
        x = x.to(SCALE_DTYPE)
        scales = x.abs().amax(-1) / INT8_MAX
        steps = x / torch.where(scales == 0, 1.0, scales)[..., None]
        # a subnormal scale is coarse, so the largest x may lie beyond the last step
        return torch.round(steps).clamp(-INT8_MAX, INT8_MAX).to(dtype), scales
    if is_float8(dtype):
        limit = float8_max(dtype, fp8_max)
        x = x.float() if scale is None else x.float() / scale
        return x.clamp(-limit, limit).to(dtype), None
    return x.to(dtype), None


def widen(numbers: Tensor, scales: Tensor | None, scale: Tensor | None) -> Tensor:
    """The way back, in float32; numbers of a wider dtype stay as they are."""
    if scales is not None:
        return numbers.to(SCALE_DTYPE) * scales[..., None]
    if is_float8(numbers.dtype):
        return numbers.float() if scale is None else numbers.float() * scale
    return numbers
