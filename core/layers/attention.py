"""Projections, norms and rotation around the backend's attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...backends.attention import AttentionParams
from ...backends.backend import Backend
from ...backends.kv_cache import Cache
from ...backends.options import AttentionSpec
from ...backends.step import StepInputs
from .linear import RowParallel
from .norm import Norm


class Attention(nn.Module):
    """Of one layer."""

    alibi_slopes: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None

    def __init__(
        self,
        layer: int,
        spec: AttentionSpec,
        backend: Backend,
        *,
        qkv: nn.Module,
        o: RowParallel,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        alibi_slopes: Tensor | None = None,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.spec = spec
        self.ops = backend.ops
        self.attention = backend.attention
        self.qkv = qkv
        self.o = o
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.register_buffer("alibi_slopes", alibi_slopes)
        self.register_buffer("key_scale", key_scale)
        self.register_buffer("value_scale", value_scale)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, inputs: StepInputs, cache: Cache
    ) -> tuple[Tensor, Cache]:
        """x [T, H] -> [T, H]; `rotation` is Rotary's cos and sin."""
        spec = self.spec
        q, k, v = self.qkv(x)
        q = q.reshape(-1, spec.num_heads, spec.head_size)
        k = k.reshape(-1, spec.num_kv_heads, spec.head_size)
        v = v.reshape(-1, spec.num_kv_heads, spec.value_size)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = self.ops.rope(q, k, *rotation)
        params = AttentionParams(
            alibi_slopes=self.alibi_slopes, key_scale=self.key_scale, value_scale=self.value_scale
        )
        out, cache = self.attention.attend(
            self.layer, spec, q, k, v, cache, inputs.attention, params
        )
        return self.o(out.reshape(-1, spec.num_heads * spec.value_size)), cache


def alibi_slopes(num_heads: int) -> Tensor:
    """f32 [num_heads]: 2**(-8 i / n) for a power of two n; a count between takes more, every second one of 2 n.

    After arXiv 2108.12409 and its authors' code.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power, 2)]
    return torch.tensor((slopes + between)[:num_heads], dtype=torch.float32)
