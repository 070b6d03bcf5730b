"""Attention over the paged cache, written to be read: every row against its whole table, scores in float32.

    table [R, M]        block ids of a row          keys of layer  [blocks, B, Hkv, D]
    tokens of a row     S = M * B, in text order     those of it that count: index < context_len

Shapes depend on the bucket alone and no value steers the program, so a compiler can take it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..attention import Attention, AttentionParams
from ..kv_cache import Cache
from ..options import AttentionSpec
from ..step import F32, I32, DeviceInputs, StepBatch, row_first, slot_mapping
from .kv_cache import PagedCache
from .kv_numbers import narrow, widen

MASKED = torch.finfo(torch.float32).min
"""Stands for minus infinity, which turns to nan where a whole row is masked."""


def attention_arrays(
    batch: StepBatch, block_size: int, layout: str = "packed"
) -> dict[str, I32 | F32]:
    """What ReferenceAttention reads beside q, k and v.

    gather [R, Q]: index into T of each query, 0 where the row has fewer.  back [T]: the way back, into R * Q.
    query_index [R, Q]: index of each query in its row's text.  context_len [R].
    slots{g} [T]: where keys of group g go, padding into the null block.  table{g} [R, M].
    """
    rows, width = batch.bucket.num_rows, batch.bucket.max_query
    offset = np.arange(width, dtype=np.int32)
    real = offset < batch.query_len[:, None]
    gather = np.where(real, row_first(batch, layout)[:, None] + offset, 0).astype(np.int32)
    back = np.zeros(batch.bucket.num_tokens, np.int32)
    back[gather[real]] = np.arange(rows * width, dtype=np.int32).reshape(rows, width)[real]
    computed = batch.context_len - batch.query_len
    arrays: dict[str, I32 | F32] = {
        "gather": gather,
        "back": back,
        "query_index": computed[:, None] + offset,
        "context_len": batch.context_len,
    }
    for group, table in enumerate(batch.block_table):
        arrays[f"slots{group}"] = np.maximum(slot_mapping(batch, group, block_size, layout), 0)
        arrays[f"table{group}"] = table
    return arrays


class ReferenceAttention(Attention):
    """Plain torch. With in_place=False the cache is never written to: a new one is returned.

    `fp8_max` is Capabilities.fp8_max.
    """

    def __init__(self, *, in_place: bool = True, fp8_max: float | None = None) -> None:
        self.in_place = in_place
        self.fp8_max = fp8_max

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
        """See Attention.attend."""
        cache = self._write(layer, k, v, cache, inputs[f"slots{spec.group}"], params)
        table = inputs[f"table{spec.group}"]
        keys, values = (
            found.reshape(table.shape[0], -1, *found.shape[2:])
            for found in self._read(layer, cache, table.reshape(-1), params)
        )
        key_index = torch.arange(keys.shape[1], dtype=torch.int32, device=q.device)
        written = key_index < inputs["context_len"][:, None]
        query_index = inputs["query_index"]
        queries = q.index_select(0, inputs["gather"].reshape(-1))
        queries = queries.reshape(*query_index.shape, *q.shape[1:])
        out = attend_rows(
            spec, params, queries, keys, values, query_index, key_index[None], written
        )
        out = out.reshape(-1, spec.num_heads, spec.value_size)
        return out.index_select(0, inputs["back"]).to(q.dtype), cache

    def _write(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        cache: PagedCache,
        at: Tensor,
        params: AttentionParams,
    ) -> PagedCache:
        return write_tokens(
            layer, k, v, cache, at, params, in_place=self.in_place, fp8_max=self.fp8_max
        )

    def _read(
        self, layer: int, cache: PagedCache, blocks: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        return read_blocks(layer, cache, blocks, params)


def attend_rows(
    spec: AttentionSpec,
    params: AttentionParams,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    query_index: Tensor,
    key_index: Tensor,
    written: Tensor,
) -> Tensor:
    """Each row's queries against its own keys: f32 [R, Q, Hq, Dv], finite where a query sees nothing.

    q [R, Q, Hq, D], keys [R, S, Hkv, D], values [R, S, Hkv, Dv]. query_index [R, Q] and key_index [R or 1, S] are
    places in the row's text; written [R, S] tells the keys that count.
    """
    key_index, query_index = key_index[:, None], query_index[:, :, None]
    seen = written[:, None] & (key_index <= query_index)
    alive = written
    if spec.window is not None:
        seen = seen & (key_index > query_index - spec.window)
        alive = alive & (key_index > query_index[:, :1] - spec.window)[:, 0]
    values = torch.where(alive[:, :, None, None], values, 0.0)

    queries = q.reshape(*q.shape[:2], spec.num_kv_heads, -1, spec.head_size)
    scores = torch.einsum("rqhgd,rshd->rhgqs", queries.float(), keys.float()) * spec.scale
    if spec.soft_cap is not None:
        scores = torch.tanh(scores / spec.soft_cap) * spec.soft_cap
    if spec.alibi:
        assert params.alibi_slopes is not None
        slopes = params.alibi_slopes.float().reshape(spec.num_kv_heads, -1, 1, 1)
        scores = scores + slopes * (key_index - query_index)[:, None, None]
    scores = torch.where(seen[:, None, None], scores, MASKED)
    out = torch.einsum("rhgqs,rshd->rqhgd", _softmax(scores, spec, params), values.float())
    return out.reshape(*q.shape[:2], spec.num_heads, spec.value_size)


def write_tokens(
    layer: int,
    k: Tensor,
    v: Tensor,
    cache: PagedCache,
    at: Tensor,
    params: AttentionParams,
    *,
    in_place: bool,
    fp8_max: float | None,
) -> PagedCache:
    """k [T, Hkv, D] and v [T, Hkv, Dv] at the token slots `at` [T] of a layer, as its cache holds them."""
    keys, key_scales = narrow(k, cache.keys[layer].dtype, params.key_scale, fp8_max)
    values, value_scales = narrow(v, cache.values[layer].dtype, params.value_scale, fp8_max)

    def written(pages: Mapping[int, Tensor], x: Tensor | None) -> Mapping[int, Tensor]:
        if x is None:
            return pages
        flat = pages[layer].flatten(0, 1)
        if in_place:
            flat.index_put_((at,), x)
            return pages
        return {**pages, layer: flat.index_put((at,), x).reshape(pages[layer].shape)}

    return cache._replace(
        keys=written(cache.keys, keys),
        values=written(cache.values, values),
        key_scales=written(cache.key_scales, key_scales),
        value_scales=written(cache.value_scales, value_scales),
    )


def read_blocks(
    layer: int, cache: PagedCache, blocks: Tensor, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """Keys [N, B, Hkv, D] and values [N, B, Hkv, Dv] of `blocks` [N], as attention takes them."""

    def read(
        pages: Mapping[int, Tensor], scales: Mapping[int, Tensor], scale: Tensor | None
    ) -> Tensor:
        found = scales[layer].index_select(0, blocks) if layer in scales else None
        return widen(pages[layer].index_select(0, blocks), found, scale)

    return (
        read(cache.keys, cache.key_scales, params.key_scale),
        read(cache.values, cache.value_scales, params.value_scale),
    )


def _softmax(scores: Tensor, spec: AttentionSpec, params: AttentionParams) -> Tensor:
    """Over the keys of scores [R, Hkv, G, Q, S]; a sink takes its share of the sum and gives no value."""
    if not spec.sinks:
        return torch.softmax(scores, -1)
    assert params.sinks is not None
    sink = params.sinks.float().reshape(1, spec.num_kv_heads, -1, 1, 1)
    sink = sink.expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, sink), -1), -1)[..., :-1]
