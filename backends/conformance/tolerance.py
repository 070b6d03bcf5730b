"""How far a value may be from its float64 oracle, per dtype, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..step import F32


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """|found - wanted| <= absolute + relative * |wanted|."""

    absolute: float
    relative: float
    reason: str


TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(
        absolute=5e-5,
        relative=5e-5,
        reason="24 bits of mantissa: sums of some hundred products of order 1, in any order, stay within a fiftieth of "
        "it, and an approximate exp or tanh has room",
    ),
    "bfloat16": Tolerance(
        absolute=2e-2,
        relative=2e-2,
        reason="8 bits of mantissa: a 512th at each of the few places where a kernel may round (scores, weights of the "
        "softmax, products, the result), and their sum over values of order 1",
    ),
    "float16": Tolerance(
        absolute=2.5e-3,
        relative=2.5e-3,
        reason="as bfloat16, with 11 bits of mantissa: an eighth of it",
    ),
    "int8": Tolerance(
        absolute=2.5e-3,
        relative=2.5e-3,
        reason="of a cache whose numbers are the oracle's and whose scales may be held in float16: a 2048th of each "
        "key and value of order 1",
    ),
}


def excess(found: F32 | NDArray[np.float64], wanted: NDArray[np.float64], dtype: str) -> float:
    """The largest error as a share of what `dtype` allows: above 1 is a failure; inf where `found` is not finite."""
    tolerance = TOLERANCES[dtype]
    if not found.size:
        return 0.0
    error = np.abs(found.astype(np.float64) - wanted)
    allowed = tolerance.absolute + tolerance.relative * np.abs(wanted)
    return float(np.nan_to_num(error / allowed, nan=np.inf, posinf=np.inf).max())
