"""Mistakes of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from chipset.backends.attention import AttentionParams
from chipset.backends.options import AttentionSpec
from chipset.backends.reference.attention import ReferenceAttention, attention_arrays
from chipset.backends.reference.kv_cache import PagedCache
from chipset.backends.step import F32, I32, StepBatch, slot_mapping

from ..mutation import Mutation
from ..reference_plugin import CAPABILITIES, DynamicPlugin, ReferencePlugin

Inputs = Mapping[str, Tensor]
Found = tuple[Tensor, PagedCache]


@dataclass(frozen=True, kw_only=True)
class Masks:
    """What an attention written out may get wrong about masks."""

    masked: float = torch.finfo(torch.float32).min
    masks_values: bool = True
    values_by_window: bool = True
    caps_masked: bool = False
    sees_before: bool = True
    """Keys of before this step."""

    def attend(
        self, spec: AttentionSpec, layer: int, q: Tensor, cache: PagedCache, inputs: Inputs
    ) -> Tensor:
        """[T, Hq, Dv], without sinks and ALiBi."""
        table, length = inputs[f"table{spec.group}"], inputs["context_len"][:, None, None]
        rows = table.shape[0]
        keys, values = (
            pages[layer]
            .index_select(0, table.reshape(-1))
            .reshape(rows, -1, *pages[layer].shape[2:])
            for pages in (cache.keys, cache.values)
        )
        query, key = inputs["query_index"][:, :, None], torch.arange(keys.shape[1])
        seen = (key < length) & (key <= query)
        alive = (key < length)[:, 0]
        if spec.window is not None:
            seen = seen & (key > query - spec.window)
            if self.values_by_window:
                alive = alive & (key > query[:, 0] - spec.window)
        if not self.sees_before:
            seen = seen & (key >= query[:, :1])
        if self.masks_values:
            values = torch.where(alive[:, :, None, None], values, 0.0)
        queries = q.index_select(0, inputs["gather"].reshape(-1))
        queries = queries.reshape(
            rows, -1, spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, q.shape[-1]
        )
        scores = torch.einsum("rqhgd,rshd->rhgqs", queries.float(), keys.float()) * spec.scale
        if self.caps_masked:
            scores = torch.where(seen[:, None, None], scores, self.masked)
        if spec.soft_cap is not None:
            scores = torch.tanh(scores / spec.soft_cap) * spec.soft_cap
        if not self.caps_masked:
            scores = torch.where(seen[:, None, None], scores, self.masked)
        out = torch.einsum("rhgqs,rshd->rqhgd", torch.softmax(scores, -1), values.float())
        out = out.reshape(-1, spec.num_heads, spec.value_size)
        return out.index_select(0, inputs["back"]).to(q.dtype)


class Masked(ReferenceAttention):
    """Writes as the reference does, and attends with masks of its own."""

    def __init__(self, masks: Masks, *, in_place: bool) -> None:
        super().__init__(in_place=in_place)
        self.masks = masks

    def attend(self, layer, spec, q, k, v, cache, inputs, params):  # type: ignore[no-untyped-def]
        out, cache = super().attend(layer, spec, q, k, v, cache, inputs, params)
        if spec.sinks or spec.alibi or cache.keys[layer].element_size() == 1:
            return out, cache
        return self.masks.attend(spec, layer, q, cache, inputs), cache


class OtherSpec(ReferenceAttention):
    """Attends by a spec that is not quite the one given."""

    def changed(self, spec: AttentionSpec) -> AttentionSpec:
        return spec

    def attend(self, layer, spec, q, k, v, cache, inputs, params):  # type: ignore[no-untyped-def]
        return super().attend(layer, self.changed(spec), q, k, v, cache, inputs, params)


class WiderWindow(OtherSpec):
    def changed(self, spec: AttentionSpec) -> AttentionSpec:
        return spec if spec.window is None else replace(spec, window=spec.window + 1)


class NarrowerWindow(OtherSpec):
    def changed(self, spec: AttentionSpec) -> AttentionSpec:
        return spec if spec.window is None else replace(spec, window=max(1, spec.window - 1))


class OwnScale(OtherSpec):
    def changed(self, spec: AttentionSpec) -> AttentionSpec:
        return replace(spec, scale=spec.head_size**-0.5)


class NoSinks(OtherSpec):
    def changed(self, spec: AttentionSpec) -> AttentionSpec:
        return replace(spec, sinks=False)


class OwnSlopes(ReferenceAttention):
    def attend(self, layer, spec, q, k, v, cache, inputs, params):  # type: ignore[no-untyped-def]
        slopes = 2.0 ** (-8.0 * torch.arange(1, spec.num_heads + 1) / spec.num_heads)
        params = AttentionParams(sinks=params.sinks, alibi_slopes=slopes if spec.alibi else None)
        return super().attend(layer, spec, q, k, v, cache, inputs, params)


class StridedHeads(ReferenceAttention):
    def attend(self, layer, spec, q, k, v, cache, inputs, params):  # type: ignore[no-untyped-def]
        shared = spec.num_heads // spec.num_kv_heads
        order = torch.arange(spec.num_heads).reshape(shared, -1).T.reshape(-1)
        q = q.index_select(1, order)
        out, cache = super().attend(layer, spec, q, k, v, cache, inputs, params)
        return out.index_select(1, torch.argsort(order)), cache


class WritesLate(ReferenceAttention):
    def attend(self, layer, spec, q, k, v, cache, inputs, params):  # type: ignore[no-untyped-def]
        nothing = torch.zeros_like(k), torch.zeros_like(v)
        out, cache = super().attend(layer, spec, q, *nothing, cache, inputs, params)
        return out, self._write(layer, k, v, cache, inputs[f"slots{spec.group}"], params)


class OldCache(ReferenceAttention):
    def attend(self, layer, spec, q, k, v, cache, inputs, params):  # type: ignore[no-untyped-def]
        out, _ = super().attend(layer, spec, q, k, v, cache, inputs, params)
        return out, cache


class FirstLayer(ReferenceAttention):
    def attend(self, layer, spec, q, k, v, cache, inputs, params):  # type: ignore[no-untyped-def]
        shape = cache.keys[layer].shape
        same = [other for other, pages in cache.keys.items() if pages.shape == shape]
        return super().attend(min(same), spec, q, k, v, cache, inputs, params)


class Coarse(ReferenceAttention):
    def attend(self, layer, spec, q, k, v, cache, inputs, params):  # type: ignore[no-untyped-def]
        q = q.to(torch.bfloat16).to(q.dtype)
        return super().attend(layer, spec, q, k, v, cache, inputs, params)


def wrapping_slots(batch: StepBatch, block_size: int) -> dict[str, I32 | F32]:
    arrays = attention_arrays(batch, block_size)
    for group in range(len(batch.block_table)):
        arrays[f"slots{group}"] = slot_mapping(batch, group, block_size, "packed")
    return arrays


def one_table(batch: StepBatch, block_size: int) -> dict[str, I32 | F32]:
    arrays = attention_arrays(batch, block_size)
    for group, table in enumerate(batch.block_table):
        arrays[f"table{group}"] = batch.block_table[0] if table.any() else table
    return arrays


def preferred_block_size(batch: StepBatch, block_size: int) -> dict[str, I32 | F32]:
    return attention_arrays(batch, CAPABILITIES.block_sizes[0])


def restarted_queries(batch: StepBatch, block_size: int) -> dict[str, I32 | F32]:
    arrays = attention_arrays(batch, block_size)
    arrays["query_index"] = np.where(
        batch.query_len[:, None] > 1,
        np.arange(batch.bucket.max_query, dtype=np.int32),
        arrays["query_index"],
    )
    return arrays


def _with(name: str, mistake: str, **parts: object) -> Mutation:
    return Mutation(
        name=name, area="attention", mistake=mistake, plugin=partial(ReferencePlugin, **parts)
    )


def _masks(name: str, mistake: str, **masks: object) -> Mutation:
    return _with(name, mistake, attention=partial(Masked, Masks(**masks)))  # type: ignore[arg-type]


MUTATIONS: tuple[Mutation, ...] = (
    _with("window one token wider", "each query sees a key more", attention=WiderWindow),
    _with("window one token narrower", "each query sees a key less", attention=NarrowerWindow),
    _with("scale of its own", "1 / sqrt(head_size) in place of the spec's", attention=OwnScale),
    _with("sinks left out", "the softmax has no sink", attention=NoSinks),
    _with("slopes of its own", "ALiBi's formula in place of the tensor given", attention=OwnSlopes),
    _with("key heads strided", "query head h reads key head h mod Hkv", attention=StridedHeads),
    _with("written late", "keys are written after they should be read", attention=WritesLate),
    _with(
        "layer of its group", "all layers of a shape share one layer's cache", attention=FirstLayer
    ),
    _with("queries rounded", "float32 queries are rounded to bfloat16", attention=Coarse),
    _with(
        "padding into the last block",
        "a slot of -1 counts from the end of the cache",
        arrays=wrapping_slots,
    ),
    _with("one table for all", "every group reads the first group's table", arrays=one_table),
    _with(
        "block size preferred, not asked for",
        "tables are read by the first size claimed",
        arrays=preferred_block_size,
    ),
    _with(
        "chunks from zero",
        "a chunk's queries are taken for the text's first",
        arrays=restarted_queries,
    ),
    _masks("values not masked", "0 * nan of unwritten values reaches rows", masks_values=False),
    _masks(
        "values left of the window not masked",
        "0 * nan of blocks given back reaches rows",
        values_by_window=False,
    ),
    _masks("minus infinity in masks", "padding rows, all masked, become nan", masked=-torch.inf),
    _masks("cap after the mask", "masked scores become -cap and are seen", caps_masked=True),
    _masks("chunks by themselves", "a chunk does not see those before it", sees_before=False),
    Mutation(
        name="old cache returned",
        area="attention",
        mistake="what a functional step wrote is not handed on",
        plugin=partial(DynamicPlugin, attention=OldCache),
    ),
    Mutation(
        name="supports more than claimed",
        area="attention",
        mistake="supports() takes sinks, which the capabilities leave out",
        plugin=partial(
            ReferencePlugin,
            capabilities=replace(CAPABILITIES, attention=CAPABILITIES.attention - {"sinks"}),
        ),
    ),
)
