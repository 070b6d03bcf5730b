"""Rotary position embeddings: tables of cos and sin, made once per process for the served context."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...backends.runtime import Runtime
from .rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling


class Rotary(nn.Module):
    """positions [T] -> cos and sin, f32 [T, D' / 2]."""

    cos: Tensor
    """[max_context, D' / 2]"""
    sin: Tensor

    def __init__(self, rope: Rope, max_context: int, runtime: Runtime) -> None:
        super().__init__()
        cos, sin = rope_tables(rope, max_context)
        self.register_buffer("cos", runtime.put(cos))
        self.register_buffer("sin", runtime.put(sin))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens of a step."""
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)


def rope_tables(rope: Rope, max_context: int) -> tuple[Tensor, Tensor]:
    """Cos and sin times the attention factor, f32 [max_context, D' / 2]."""
    angle = torch.outer(torch.arange(max_context).float(), inverse_frequencies(rope, max_context))
    return angle.cos() * rope.attention_factor, angle.sin() * rope.attention_factor


def inverse_frequencies(rope: Rope, max_context: int) -> Tensor:
    """Radians per token, f32 [D' / 2]."""
    exponent = torch.arange(0, rope.rotary_size, 2).float() / rope.rotary_size
    plain = 1.0 / rope.theta**exponent
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor=factor):
            return plain / factor
        case Llama3Scaling():
            return _llama3(plain, rope.scaling)
        case YarnScaling():
            return _yarn(plain, rope, rope.scaling)
        case LongRopeScaling() as scaling:
            is_long = max_context > scaling.original_max_positions
            factors = scaling.long_factor if is_long else scaling.short_factor
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponent)


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1's reference: how often a frequency turns within the original context decides its share of scaling."""
    turns = scaling.original_max_positions * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / scaling.factor + share * plain


def _yarn(plain: Tensor, rope: Rope, scaling: YarnScaling) -> Tensor:
    """YaRN's "NTK by parts", with a ramp over the dimensions."""

    def dimension(turns: float) -> float:
        """Where a frequency turns so often within the original context."""
        wavelength = scaling.original_max_positions / (turns * 2 * math.pi)
        return rope.rotary_size * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.rotary_size - 1)
    width = last - first or 0.001
    scaled = ((torch.arange(rope.rotary_size // 2).float() - first) / width).clamp(0, 1)
    return plain / scaling.factor * scaled + plain * (1 - scaled)
