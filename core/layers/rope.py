"""A rotary position embedding as numbers. No torch here: rotary.py makes the tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """All frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones left alone, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """A linear ramp over the dimensions from unscaled to divided by `factor` (arXiv 2309.00071)."""

    factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    original_max_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRopeScaling:
    """A divisor for each frequency: one set up to the original length, another beyond it (arXiv 2402.13753)."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int


RopeScaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """A rotary position embedding."""

    theta: float
    rotary_size: int
    """The first dimensions of each head that are rotated; even, at most head_size."""
    scaling: RopeScaling | None = None
    attention_factor: float = 1.0
    """Multiplies cos and sin."""
