"""Attention as its definition says it, dense and in float64 on the host."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..options import AttentionSpec

F64 = NDArray[np.float64]


def attention(
    spec: AttentionSpec,
    q: F64,
    k: F64,
    v: F64,
    *,
    first: int,
    sinks: F64 | None = None,
    alibi_slopes: F64 | None = None,
) -> F64:
    """Queries `first`, `first` + 1, … of a text against its keys from the beginning on.

    q [N, Hq, D], k [S, Hkv, D], v [S, Hkv, Dv], sinks and alibi_slopes [Hq] -> [N, Hq, Dv].
    """
    query = first + np.arange(len(q))[:, None]
    key = np.arange(len(k))[None, :]
    seen = key <= query
    if spec.window is not None:
        seen &= query - key < spec.window
    shared = np.arange(spec.num_heads) // (spec.num_heads // spec.num_kv_heads)
    scores = np.einsum("nhd,shd->hns", q, k[:, shared]) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes[:, None, None] * (key - query)
    top = np.where(seen, scores, -np.inf).max(-1, keepdims=True)
    weights = np.where(seen, np.exp(np.minimum(scores - top, 0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - top)
    found: F64 = np.einsum("hns,shd->nhd", weights / total, v[:, shared])
    return found
