"""Attention in the rows layout: prompts beside their context, decode rows over one list of the blocks in use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...backends.attention import Attention, AttentionParams
from ...backends.kv_cache import Cache
from ...backends.options import AttentionSpec
from ...backends.reference.attention import MASKED, attend_rows, read_blocks, write_tokens
from ...backends.reference.kv_cache import PagedCache
from ...backends.reference.kv_numbers import narrow, widen
from ...backends.shapes import Phase
from ...backends.step import F32, I32, DeviceInputs, StepBatch, slot_mapping
from .rules import RuleBroken


def packed_arrays(batch: StepBatch, block_size: int) -> dict[str, I32 | F32]:
    """What PackedAttention reads beside q, k and v, per KV group g; N is bucket.num_blocks.

    Always: slots{g} [T].  context_len [R].
    Decode: block{g} [N] the blocks in use.  block_row{g} [N] whose each is, R on padding.  block_start{g} [N] index in
    the row's text of its first token.
    Prefill: computed [R].  context{g} [R, context_blocks].
    """
    bucket = batch.bucket
    arrays: dict[str, I32 | F32] = {"context_len": batch.context_len}
    if bucket.phase is Phase.PREFILL:
        arrays["computed"] = batch.context_len - batch.query_len
    for group, table in enumerate(batch.block_table):
        slots = slot_mapping(batch, group, block_size, "rows")
        arrays[f"slots{group}"] = np.maximum(slots, 0)
        if bucket.phase is Phase.PREFILL:
            arrays[f"context{group}"] = table[:, : bucket.context_blocks].copy()
        else:
            arrays |= _block_list(batch, group, table, block_size)
    return arrays


def _block_list(batch: StepBatch, group: int, table: I32, block_size: int) -> dict[str, I32 | F32]:
    used = np.arange(table.shape[1]) < -(-batch.context_len // block_size)[:, None]
    row, column = np.nonzero(np.where(used, table, 0))
    size = batch.bucket.num_blocks
    if row.size > size:
        raise RuleBroken("packed blocks", f"{row.size} blocks in use, {size} in the bucket")

    def padded(values: I32, filler: int) -> I32:
        out = np.full(size, filler, np.int32)
        out[: values.size] = values
        return out

    return {
        f"block{group}": padded(table[row, column], 0),
        f"block_row{group}": padded(row.astype(np.int32), batch.bucket.num_rows),
        f"block_start{group}": padded((column * block_size).astype(np.int32), 0),
    }


class PackedAttention(Attention):
    """Written in place. A prefill gathers only the blocks that were there before it.

    `fp8_max` is Capabilities.fp8_max.
    """

    def __init__(self, *, fp8_max: float | None = None) -> None:
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
        at = inputs[f"slots{spec.group}"]
        is_prefill = "computed" in inputs
        if is_prefill:
            own = self._as_held(layer, k, v, cache, params)
            out = _prefill(layer, spec, params, q, *own, cache, inputs)
        cache = write_tokens(layer, k, v, cache, at, params, in_place=True, fp8_max=self.fp8_max)
        if not is_prefill:
            out = _decode(layer, spec, params, q, cache, inputs)
        return out.to(q.dtype), cache

    def _as_held(
        self, layer: int, k: Tensor, v: Tensor, cache: PagedCache, params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        """What attention would find of k and v if it had written them."""
        pairs = (
            (k, cache.keys[layer].dtype, params.key_scale),
            (v, cache.values[layer].dtype, params.value_scale),
        )
        keys, values = (
            widen(*narrow(x, dtype, scale, self.fp8_max), scale) for x, dtype, scale in pairs
        )
        return keys, values


def _prefill(
    layer: int,
    spec: AttentionSpec,
    params: AttentionParams,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: PagedCache,
    inputs: DeviceInputs,
) -> Tensor:
    """Each row's queries against the blocks of its context and the keys that it brings."""
    context, computed = inputs[f"context{spec.group}"], inputs["computed"][:, None]
    rows = context.shape[0]
    keys, values = k.reshape(rows, -1, *k.shape[1:]), v.reshape(rows, -1, *v.shape[1:])
    if context.shape[1]:
        before = read_blocks(layer, cache, context.reshape(-1), params)
        keys, values = (
            torch.cat((found.reshape(rows, -1, *own.shape[2:]), own), 1)
            for found, own in zip(before, (keys, values), strict=True)
        )
    queries = q.reshape(rows, -1, *q.shape[1:])
    num_before = keys.shape[1] - queries.shape[1]
    before_index = torch.arange(num_before, dtype=torch.int32, device=q.device)
    query_index = computed + torch.arange(queries.shape[1], dtype=torch.int32, device=q.device)
    out = attend_rows(
        spec,
        params,
        queries,
        keys,
        values,
        query_index,
        torch.cat((before_index.expand(rows, -1), query_index), 1),
        torch.cat((before_index < computed, query_index < inputs["context_len"][:, None]), 1),
    )
    return out.reshape(-1, spec.num_heads, spec.value_size)


def _decode(
    layer: int,
    spec: AttentionSpec,
    params: AttentionParams,
    q: Tensor,
    cache: PagedCache,
    inputs: DeviceInputs,
) -> Tensor:
    """Scores of every block in use against its row's query; then the parts of a row are added up."""
    block, block_row, start = (
        inputs[f"{name}{spec.group}"] for name in ("block", "block_row", "block_start")
    )
    keys, values = read_blocks(layer, cache, block, params)
    num_rows, heads = q.shape[0], spec.num_kv_heads
    row = block_row.clamp(max=num_rows - 1)
    query_index = (inputs["context_len"] - 1).index_select(0, row)[:, None]
    key_index = start[:, None] + torch.arange(keys.shape[1], dtype=torch.int32, device=q.device)
    seen = (block_row < num_rows)[:, None] & (key_index <= query_index)
    if spec.window is not None:
        seen = seen & (key_index > query_index - spec.window)

    queries = q.float().index_select(0, row).reshape(-1, heads, q.shape[1] // heads, q.shape[2])
    scores = torch.einsum("nhgd,nbhd->nhgb", queries, keys.float()) * spec.scale
    if spec.soft_cap is not None:
        scores = torch.tanh(scores / spec.soft_cap) * spec.soft_cap
    if spec.alibi:
        assert params.alibi_slopes is not None
        slopes = params.alibi_slopes.float().reshape(heads, -1, 1)
        scores = scores + slopes * (key_index - query_index)[:, None, None]
    scores = torch.where(seen[:, None, None], scores, MASKED)

    every_row = torch.arange(num_rows, dtype=torch.int32, device=q.device)[:, None]
    mine = block_row == every_row
    most = torch.where(mine[:, :, None, None], scores.amax(-1), MASKED).amax(1)
    sinks = None
    if spec.sinks:
        assert params.sinks is not None
        sinks = params.sinks.float().reshape(heads, -1)
        most = torch.maximum(most, sinks)
    weights = torch.exp(scores - most.index_select(0, row)[..., None])
    weights = torch.where(seen[:, None, None], weights, 0.0)
    values = torch.where(seen[:, :, None, None], values, 0.0).float()
    parts = torch.cat(
        (torch.einsum("nhgb,nbhd->nhgd", weights, values), weights.sum(-1, keepdim=True)), -1
    )
    # no product with 0 and 1: 0 * nan would carry one row's nan into the others
    total = parts.new_zeros(num_rows, *parts.shape[1:]).index_add(0, row, parts)
    sums = total[..., -1:]
    if sinks is not None:
        sums = sums + torch.exp(sinks - most)[..., None]
    tiny = torch.finfo(torch.float32).tiny
    return (total[..., :-1] / sums.clamp(min=tiny)).reshape(num_rows, -1, spec.value_size)
