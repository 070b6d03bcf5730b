"""Attention on the CPU: rows that bring one token are attended to together, longer ones each alone.

Only keys that count are ever gathered, so whatever else lies in the cache reaches no row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.attention import Attention, AttentionParams
from ...backends.kv_cache import Cache
from ...backends.options import AttentionSpec
from ...backends.reference.kv_numbers import is_float8, narrow
from ...backends.step import DeviceInputs
from .gathered import Gathered
from .rows import AttentionInputs, Part, visible

MASKED = torch.finfo(torch.float32).min
QUERY_CHUNK = 64
"""Queries whose scores are held at once where torch's fused attention does not serve."""


class CPUAttention(Attention):
    """Torch's fused attention; written out only for soft caps, sinks and ALiBi."""

    def __init__(self) -> None:
        self._keys = Gathered()
        self._values = Gathered()

    def supports(self, spec: AttentionSpec) -> Sequence[str]:
        """Everything causal."""
        return () if spec.causal else ("only causal attention is served",)

    def attend(
        self,
        layer: int,
        spec: AttentionSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Cache,
        inputs: DeviceInputs,
        params: AttentionParams,
    ) -> tuple[Tensor, Cache]:
        """See Attention.attend; the cache is written in place."""
        assert isinstance(inputs, AttentionInputs)
        at = inputs.targets(spec.group)
        keys, key_scales = _slots(layer, cache.keys, cache.key_scales)
        values, value_scales = _slots(layer, cache.values, cache.value_scales)
        _write(k[: len(at)], at, keys, key_scales, params.key_scale)
        _write(v[: len(at)], at, values, value_scales, params.value_scale)
        has_scale = is_float8(keys.dtype)
        if has_scale and params.key_scale is not None:
            # q of k * scale is q * scale of k, and there are fewer of q
            q = q * params.key_scale
        written_out = spec.soft_cap is not None or spec.sinks or spec.alibi
        parts = inputs.parts(spec.group, spec.window)
        out = q.new_zeros(q.shape[0], spec.num_heads, spec.value_size)
        for part in parts:
            queries = q[part.tokens].reshape(len(part.query_index), -1, *q.shape[1:])
            part_keys = self._keys.take(keys, key_scales, part, q.dtype)
            part_values = self._values.take(values, value_scales, part, q.dtype)
            if written_out:
                found = _attend(spec, part, queries, part_keys, part_values, params)
            else:
                found = _attend_fused(spec, part, queries, part_keys, part_values)
            out[part.tokens] = found.reshape(-1, *out.shape[1:])
        if has_scale and params.value_scale is not None:
            out *= params.value_scale
        return out, cache


def _slots(
    layer: int, pages: Mapping[int, Tensor], scales: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Views by token slot: [slots, H, D], and [slots, H] where there are scales."""
    found = scales.get(layer)
    return pages[layer].flatten(0, 1), None if found is None else found.flatten(0, 1)


def _write(
    x: Tensor, at: Tensor, slots: Tensor, slot_scales: Tensor | None, scale: Tensor | None
) -> None:
    """x [T, H, D] at the token slots `at` [T]."""
    numbers, scales = narrow(x, slots.dtype, scale)
    if is_float8(slots.dtype):
        # torch has no index_copy_ of float8
        slots, numbers = slots.view(torch.uint8), numbers.view(torch.uint8)
    slots.index_copy_(0, at, numbers)
    if slot_scales is not None and scales is not None:
        slot_scales.index_copy_(0, at, scales)


def _attend_fused(spec: AttentionSpec, part: Part, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [R, Q, Hq, D], k and v [R, S, Hkv, D] -> [R, Q, Hq, Dv]."""
    rows, num_queries = q.shape[:2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if num_queries == 1:
        # the heads that share a key as queries of one product
        q = q.reshape(rows, spec.num_kv_heads, -1, spec.head_size)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=part.bias, scale=spec.scale)
        return out.reshape(rows, 1, spec.num_heads, spec.value_size)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k,
        v,
        attn_mask=part.bias,
        is_causal=part.causal,
        scale=spec.scale,
        enable_gqa=spec.num_kv_heads != spec.num_heads,
    )
    return out.transpose(1, 2)


def _attend(
    spec: AttentionSpec, part: Part, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams
) -> Tensor:
    """The same with soft cap, ALiBi and sinks, in float32 and a few queries at a time."""
    k, v = k.float().permute(0, 2, 3, 1)[:, :, None], v.float().transpose(1, 2)[:, :, None]
    queries = torch.split(q.float(), QUERY_CHUNK, 1)
    chunks = zip(queries, torch.split(part.query_index, QUERY_CHUNK, 1), strict=True)
    return torch.cat([_attend_chunk(spec, part, *c, k, v, params) for c in chunks], 1).to(q.dtype)


def _attend_chunk(
    spec: AttentionSpec,
    part: Part,
    q: Tensor,
    query_index: Tensor,
    k: Tensor,
    v: Tensor,
    params: AttentionParams,
) -> Tensor:
    """q [R, Q, Hq, D], k [R, Hkv, 1, D, S], v [R, Hkv, 1, S, Dv] -> [R, Q, Hq, Dv]."""
    q = q.reshape(*q.shape[:2], spec.num_kv_heads, -1, spec.head_size).permute(0, 2, 3, 1, 4)
    scores = torch.matmul(q, k).mul_(spec.scale)
    if spec.soft_cap is not None:
        scores = scores.div_(spec.soft_cap).tanh_().mul_(spec.soft_cap)
    if spec.alibi:
        assert params.alibi_slopes is not None
        distance = part.key_index[:, None] - query_index[:, :, None]
        slopes = params.alibi_slopes.float().view(spec.num_kv_heads, -1, 1, 1)
        scores += slopes * distance[:, None, None]
    seen = visible(query_index, part.key_index, spec.window)
    scores.masked_fill_(~seen[:, None, None], MASKED)
    if spec.sinks:
        assert params.sinks is not None
        sinks = params.sinks.float().view(spec.num_kv_heads, -1, 1, 1)
        scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), -1)
        weights = torch.softmax(scores, -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return torch.matmul(weights, v).permute(0, 3, 1, 2, 4).flatten(2, 3)
