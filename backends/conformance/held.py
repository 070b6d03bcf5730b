"""Keys and values as a cache of their dtype holds them, and what that is worth: the contract's words in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.dtypes import torch_dtype
from .oracle import F64

KV_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")
"""Of one byte: those that are held otherwise than by a cast."""
STEPS = 127
LEAST_DISTANCE = 0.2
"""From a tie, in steps of int8: more than a scale held as float16 moves the largest number, 127 / 2048."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Of keys or values x [tokens, H, D]."""

    numbers: Tensor
    """[tokens, H, D] as the cache holds them"""
    scales: Tensor | None
    """f32 [tokens, H] beside int8"""
    worth: F64
    """[tokens, H, D] that attention computes with"""


def held(x: Tensor, dtype: str, *, scale: float, fp8_max: float | None) -> Held:
    """`scale` of the layer, which float8 alone looks at; `fp8_max` is Capabilities.fp8_max."""
    kind, exact = torch_dtype(dtype), x.double()
    if dtype == "int8":
        scales = (exact.abs().amax(-1) / STEPS).float()
        numbers = torch.round(exact / scales[..., None].double()).clamp(-STEPS, STEPS).to(kind)
        worth = numbers.double() * scales[..., None].double()
        return Held(numbers=numbers, scales=scales, worth=worth.numpy())
    if dtype in KV_DTYPES:
        limit = torch.finfo(kind).max
        if fp8_max is not None and dtype == "float8_e4m3fn":
            limit = fp8_max
        # exact, for scales here are powers of two
        numbers = (exact / scale).clamp(-limit, limit).float().to(kind)
        return Held(numbers=numbers, scales=None, worth=numbers.double().numpy() * scale)
    numbers = x.to(kind)
    return Held(numbers=numbers, scales=None, worth=numbers.double().numpy())


def off_ties(x: Tensor) -> Tensor:
    """x [tokens, H, D], what lies about halfway between two steps of int8 moved onto the lower one.

    Then it is rounded alike whatever the last bits of the scale are; onto the lower one, so that the largest stays it.
    """
    exact = x.double()
    step = exact.abs().amax(-1, keepdim=True) / STEPS
    steps = exact / step
    is_near = (steps - torch.floor(steps) - 0.5).abs() < LEAST_DISTANCE
    return torch.where(is_near, torch.trunc(steps) * step, exact).to(x.dtype)


def layer_scales(layer: int, dtype: str) -> tuple[float, float] | None:
    """Of a layer's keys and values: for float8, and there for every second layer.

    Powers of two, so that a product with 1 / scale is the quotient; no two alike.
    """
    if dtype == "int8" or dtype not in KV_DTYPES or layer % 2:
        return None
    return 2.0 ** -(1 + layer), 2.0 ** (2 + layer)
