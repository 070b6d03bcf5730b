"""Mistakes of the KV cache, its slots and its budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from chipset.backends.compiler import Compiler
from chipset.backends.kv_cache import KVBlob, KVPlan
from chipset.backends.reference.attention import ReferenceAttention
from chipset.backends.reference.kv_numbers import is_float8
from chipset.backends.reference.sampler import ReferenceSampler
from chipset.backends.runtime import Pending

from ..bucketed import CountingCompiler
from ..mutation import Mutation
from ..reference_plugin import CAPABILITIES, FixedKVCache, ReferencePlugin


class OneLayer(FixedKVCache):
    def block_bytes(self, group):  # type: ignore[no-untyped-def]
        return super().block_bytes(group) // len(group.layers)


class CopiesPart(FixedKVCache):
    """Leaves some of what a block is made of."""

    left: tuple[str, ...] = ()

    def copy_blocks(self, cache, group, pairs):  # type: ignore[no-untyped-def]
        rest = cache._replace(**{name: {} for name in self.left})
        copied = super().copy_blocks(rest, group, pairs)
        return copied._replace(**{name: getattr(cache, name) for name in self.left})


class KeysOnly(CopiesPart):
    left = ("values",)


class ScalesNotCopied(CopiesPart):
    left = ("key_scales", "value_scales")


class NumbersAlone(FixedKVCache):
    def block_bytes(self, group):  # type: ignore[no-untyped-def]
        scales = 8 * len(group.layers) * self.block_size * group.num_kv_heads
        return super().block_bytes(group) - scales * (group.dtype == "int8")


class ScalesNotExported(FixedKVCache):
    def _taken(self, cache, group, blocks):  # type: ignore[no-untyped-def]
        blob = super()._taken(cache, group, blocks)
        if blob.key_scales is None:
            return blob
        return replace(
            blob,
            key_scales=torch.ones_like(blob.key_scales),
            value_scales=torch.ones_like(blob.value_scales),
        )


class ScalesNotImported(FixedKVCache):
    def import_blocks(self, cache, group, blocks, blob):  # type: ignore[no-untyped-def]
        found = super().import_blocks(cache._replace(key_scales={}), group, blocks, blob)
        return found._replace(key_scales=cache.key_scales)


class ScaleIgnored(ReferenceAttention):
    """Of float8."""

    def attend(self, layer, spec, q, k, v, cache, inputs, params):  # type: ignore[no-untyped-def]
        params = replace(params, key_scale=None, value_scale=None)
        return super().attend(layer, spec, q, k, v, cache, inputs, params)


class ValuesByKeyScale(ReferenceAttention):
    def attend(self, layer, spec, q, k, v, cache, inputs, params):  # type: ignore[no-untyped-def]
        params = replace(params, value_scale=params.key_scale)
        return super().attend(layer, spec, q, k, v, cache, inputs, params)


class NotScaledBack(ReferenceAttention):
    def _read(self, layer, cache, blocks, params):  # type: ignore[no-untyped-def]
        return super()._read(layer, cache, blocks, replace(params, key_scale=None))


class Rewriting(ReferenceAttention):
    """Writes numbers of its own over those of the reference."""

    def numbers(self, x, cache_numbers, scales, scale):  # type: ignore[no-untyped-def]
        return cache_numbers

    def _write(self, layer, k, v, cache, at, params):  # type: ignore[no-untyped-def]
        cache = super()._write(layer, k, v, cache, at, params)
        sides = (
            (k, cache.keys[layer], cache.key_scales.get(layer), params.key_scale),
            (v, cache.values[layer], cache.value_scales.get(layer), params.value_scale),
        )
        for x, pages, scales, scale in sides:
            held = pages.flatten(0, 1)
            found = None if scales is None else scales.flatten(0, 1)[at, :, None]
            held[at] = self.numbers(x, held[at], found, scale).to(held.dtype)
        return cache


class Unclamped(Rewriting):
    def numbers(self, x, cache_numbers, scales, scale):  # type: ignore[no-untyped-def]
        if not is_float8(cache_numbers.dtype):
            return cache_numbers
        return x if scale is None else x / scale


class RoundedDown(Rewriting):
    def numbers(self, x, cache_numbers, scales, scale):  # type: ignore[no-untyped-def]
        return cache_numbers if scales is None else torch.trunc(x / scales * 1.00001)


class OfAnotherHead(ReferenceAttention):
    def _read(self, layer, cache, blocks, params):  # type: ignore[no-untyped-def]
        rolled = {n: scales.roll(1, -1) for n, scales in cache.key_scales.items()}
        return super()._read(layer, cache._replace(key_scales=rolled), blocks, params)


class OfAllHeads(ReferenceAttention):
    def _write(self, layer, k, v, cache, at, params):  # type: ignore[no-untyped-def]
        # beside the head there is a zero for each number of the others, and the largest of all
        if cache.keys[layer].dtype != torch.int8:
            return super()._write(layer, k, v, cache, at, params)
        flat = v.abs().amax((1, 2), keepdim=True).expand(-1, v.shape[1], 1)
        scaled = super()._write(layer, k, torch.cat((v, flat), 2)[..., 1:], cache, at, params)
        numbers = torch.round(v / scaled.value_scales[layer].flatten(0, 1)[at, :, None])
        scaled.values[layer].flatten(0, 1)[at] = numbers.to(torch.int8)
        return scaled


class BackwardsPairs(FixedKVCache):
    def copy_blocks(self, cache, group, pairs):  # type: ignore[no-untyped-def]
        return super().copy_blocks(cache, group, np.ascontiguousarray(pairs[:, ::-1]))


class FirstGroup(FixedKVCache):
    def copy_blocks(self, cache, group, pairs):  # type: ignore[no-untyped-def]
        return super().copy_blocks(cache, 0, pairs)


class SortedImport(FixedKVCache):
    def import_blocks(self, cache, group, blocks, blob):  # type: ignore[no-untyped-def]
        return super().import_blocks(cache, group, np.sort(blocks), blob)


class Late(Pending[KVBlob]):
    """Looks when it is asked."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def done(self) -> bool:
        return True

    def result(self) -> KVBlob:
        return self.look()


class LateExport(FixedKVCache):
    def export_blocks(self, cache, group, blocks):  # type: ignore[no-untyped-def]
        return Late(lambda: FixedKVCache.export_blocks(self, cache, group, blocks).result())


class NoNullBlock(FixedKVCache):
    def allocate(self, plans):  # type: ignore[no-untyped-def]
        fewer = [KVPlan(group=plan.group, num_blocks=plan.num_blocks - 1) for plan in plans]
        return super().allocate(fewer)


class ResetForgotten(FixedKVCache):
    def reset_slot(self, cache, slot, counts):  # type: ignore[no-untyped-def]
        return cache


class ResetAdds(FixedKVCache):
    def reset_slot(self, cache, slot, counts):  # type: ignore[no-untyped-def]
        if counts is not None:
            cache.counts[slot] += torch.from_numpy(counts.copy())
        return cache


class ResetNext(FixedKVCache):
    def reset_slot(self, cache, slot, counts):  # type: ignore[no-untyped-def]
        return super().reset_slot(cache, (slot + 1) % (self.num_slots + 1), counts)


class Boundless(FixedKVCache):
    def budget(self, utilisation, largest_step):  # type: ignore[no-untyped-def]
        return 2 * self.runtime.memory().total


class Shrinking(FixedKVCache):
    def budget(self, utilisation, largest_step):  # type: ignore[no-untyped-def]
        self.num_asked = getattr(self, "num_asked", 0) + 1
        return super().budget(utilisation, largest_step) - self.num_asked * 2**20


class ByRow(ReferenceSampler):
    def _keep(self, cache, slot, ids, *, counted):  # type: ignore[no-untyped-def]
        row = torch.arange(len(slot), dtype=torch.int32).clamp(max=cache.counts.shape[0] - 1)
        return super()._keep(cache, row, ids, counted=counted)


class NeverFed(ReferenceSampler):
    def feed(self, inputs, cache):  # type: ignore[no-untyped-def]
        return inputs.token_ids


class Losing(CountingCompiler):
    """Gives the cache away before the step, which is gone when the step fails."""

    def wrap(self, name, module):  # type: ignore[no-untyped-def]
        run = super().wrap(name, module)

        def losing(staged, cache, *rest):  # type: ignore[no-untyped-def]
            try:
                return run(staged, cache, *rest)
            except ValueError:
                for pages in (*cache.keys.values(), *cache.values.values()):
                    pages.fill_(torch.nan)
                raise

        return losing


def _kv(name: str, mistake: str, kv: type[FixedKVCache]) -> Mutation:
    return Mutation(
        name=name, area="kv_cache", mistake=mistake, plugin=partial(ReferencePlugin, kv=kv)
    )


def _attention(name: str, mistake: str, attention: Callable[..., ReferenceAttention]) -> Mutation:
    plugin = partial(ReferencePlugin, attention=attention)
    return Mutation(name=name, area="kv_cache", mistake=mistake, plugin=plugin)


def _sampler(name: str, mistake: str, sampler: type[ReferenceSampler]) -> Mutation:
    plugin = partial(ReferencePlugin, sampler=sampler)
    return Mutation(name=name, area="kv_cache", mistake=mistake, plugin=plugin)


def _compiler(name: str, mistake: str, compiler: type[Compiler]) -> Mutation:
    plugin = partial(ReferencePlugin, compiler=compiler)
    return Mutation(name=name, area="kv_cache", mistake=mistake, plugin=plugin)


MUTATIONS: tuple[Mutation, ...] = (
    _kv("block of one layer", "block_bytes counts one layer of the group", OneLayer),
    _kv("keys alone are copied", "copy_blocks leaves the values", KeysOnly),
    _kv("copies backwards", "copy_blocks takes pairs as (to, from)", BackwardsPairs),
    _kv("copies in the first group", "copy_blocks forgets which group", FirstGroup),
    _kv("imports in order of ids", "blocks are sorted and the blob is not", SortedImport),
    _kv("export looks late", "blocks are read when result() is called", LateExport),
    _kv("null block not allocated", "the last block lies outside the cache", NoNullBlock),
    _kv("reset forgotten", "a slot keeps the counts of the request before", ResetForgotten),
    _kv("reset adds", "counts are added to those of the request before", ResetAdds),
    _kv("reset of the next slot", "counts go to the neighbour", ResetNext),
    _kv("budget without bound", "more bytes than the device has", Boundless),
    _kv("budget by what is free", "predicted anew at each call", Shrinking),
    Mutation(
        name="budget not measured",
        area="kv_cache",
        mistake="said to be profiled, and the largest step is never run",
        plugin=partial(ReferencePlugin, capabilities=replace(CAPABILITIES, kv_budget="profile")),
    ),
    _kv("block without scales", "block_bytes counts numbers alone", NumbersAlone),
    _kv("scales not copied", "copied numbers get the scales of who was there", ScalesNotCopied),
    _kv("scales not exported", "numbers of int8 leave with scales of 1", ScalesNotExported),
    _kv("key scales not imported", "keys are worth what was there before", ScalesNotImported),
    _attention("layer's scales ignored", "float8 is written and read undivided", ScaleIgnored),
    _attention("values by the key scale", "one scale for both", ValuesByKeyScale),
    _attention("keys not scaled back", "float8 keys are read as they lie", NotScaledBack),
    _attention("numbers not clamped", "what float8 cannot hold becomes nan", Unclamped),
    _attention(
        "clamped to another form's range",
        "240 is the largest where 448 is claimed",
        partial(ReferenceAttention, fp8_max=240.0),
    ),
    _attention("rounded down", "int8 loses up to a step, not half of one", RoundedDown),
    _attention("scale of another head", "keys are read by their neighbour's", OfAnotherHead),
    _attention("one scale for all heads", "the smaller heads lose their steps", OfAllHeads),
    _sampler("drawn ids by row", "ids and counts are kept by row, not by slot", ByRow),
    _sampler("drawn ids not fed", "token_slot is ignored", NeverFed),
    _compiler("lost cache called usable", "a failed step spoils it, usable() says yes", Losing),
)
