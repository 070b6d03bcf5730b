"""The KV cache: what goes in comes out, and nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ..attention import Attention, AttentionParams
from ..capabilities import Capabilities
from ..kv_cache import Cache, KVBlob
from ..options import AttentionSpec, EngineOptions
from ..plugin import Plugin
from ..reference.dtypes import torch_dtype
from ..step import DeviceInputs
from .blobs import blocks_of, expect_same, random_blob, tokens
from .contents import copy, everything, expect_kept, put_in
from .held import KV_DTYPES, Held
from .layers import Layers
from .rows import padded
from .session import Session
from .suite import Suite, session, small_model
from .texts import Text, Texts

FIRST = AttentionSpec(
    num_heads=4, num_kv_heads=2, head_size=64, value_size=64, scale=0.125, group=0
)
SECOND = replace(FIRST, num_kv_heads=1, group=1)
DTYPES = ("auto", *KV_DTYPES)
NUM_BLOCKS = 140
"""Enough for 64 pairs, the null block and some that nobody asks for."""


class KVCacheSuite(Suite):
    """Two KV groups of two layers each, in a cache whose blocks hold what the case put there."""

    @contextmanager
    def kv_session(
        self, plugin: Plugin, *, kv_dtype: str = "auto", block_size: int | None = None
    ) -> Iterator[Session]:
        """A session whose blocks all hold 0.25; skips where `kv_dtype` is not claimed."""
        capabilities = plugin.capabilities(plugin.probe())
        self.require(kv_dtype in capabilities.kv_dtypes, f"no KV cache of {kv_dtype} is claimed")
        dtype = self.base_dtype(capabilities)
        model = small_model(
            [FIRST, SECOND],
            dtype=dtype,
            kv_dtype=None if kv_dtype == "auto" else kv_dtype,
            layers_per_group=2,
        )
        options = EngineOptions(
            dtype=dtype, kv_dtype=kv_dtype, block_size=block_size, max_batch_rows=4
        )
        with session(plugin, model, options, num_blocks=NUM_BLOCKS) as opened:
            opened.fill(0.25)
            yield opened

    @pytest.mark.parametrize("kv_dtype", DTYPES)
    def test_a_block_takes_at_least_what_it_holds(self, plugin: Plugin, kv_dtype: str) -> None:
        """block_bytes is an int, of keys and values of all layers of the group, and of scales of two bytes or more."""
        with self.kv_session(plugin, kv_dtype=kv_dtype) as opened:
            for group in opened.launch.model.groups:
                head = (group.head_size + group.value_size) * torch_dtype(group.dtype).itemsize
                head += 2 * 2 * (group.dtype == "int8")
                least = len(group.layers) * opened.block_size * group.num_kv_heads * head
                found = opened.backend.kv.block_bytes(group)
                assert isinstance(found, int)
                assert found >= least, f"{found} bytes cannot hold a block of {least}"

    @pytest.mark.parametrize(
        ("kv_dtype", "count"), [*(("auto", n) for n in (1, 3, 64)), *((d, 3) for d in KV_DTYPES)]
    )
    def test_what_is_imported_is_exported(self, plugin: Plugin, kv_dtype: str, count: int) -> None:
        """Exactly, in the order asked for, in its own group, and no other block changes."""
        if count == 64:
            self.thorough()
        with self.kv_session(plugin, kv_dtype=kv_dtype) as opened:
            for group in (0, 1):
                blocks = _blocks(count, seed=count + group)
                blob = _random(opened, group, count, seed=group)
                before = everything(opened)
                put_in(opened, group, blocks, blob)
                found = opened.export(group, blocks)
                assert found.heads == blob.heads
                expect_same(found, blob, "what was imported")
                turned = opened.export(group, blocks[::-1])
                backwards = blocks_of(blob, range(count - 1, -1, -1), opened.block_size)
                expect_same(turned, backwards, "what was imported, backwards")
                expect_kept(opened, before, {group: blocks})

    def test_an_export_has_the_tokens_of_padded_ids_too(self, plugin: Plugin) -> None:
        """The caller cuts them."""
        with self.kv_session(plugin) as opened, torch.inference_mode():
            ids = padded([5, 6, 7])
            found = opened.backend.kv.export_blocks(opened.cache, 0, ids).result()
            assert found.keys.device.type == found.values.device.type == "cpu"
            assert found.keys.shape[1] == found.values.shape[1] == ids.size * opened.block_size

    @pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
    def test_an_export_is_no_view_of_the_cache(self, plugin: Plugin, kv_dtype: str) -> None:
        """It is of when it was asked for, even if the blocks are written to before anybody waits for it."""
        with self.kv_session(plugin, kv_dtype=kv_dtype) as opened:
            blob = _random(opened, 0, 1, seed=1)
            put_in(opened, 0, [3], blob)
            found = opened.export(0, [3])
            with torch.inference_mode():
                pending = opened.backend.kv.export_blocks(opened.cache, 0, padded([3]))
            opened.overwrite(0, [3], 7.0)
            expect_same(found, blob, "what was exported before")
            expect_same(pending.result(), blob, "what was asked for before")

    @pytest.mark.parametrize(
        ("kv_dtype", "count"),
        [*(("auto", n) for n in (1, 3, 32, 64)), *((d, 3) for d in KV_DTYPES)],
    )
    def test_blocks_are_copied(self, plugin: Plugin, kv_dtype: str, count: int) -> None:
        """Keys, values and scales of all layers of the group; one source may have several targets."""
        if count == 32:
            self.thorough()
        with self.kv_session(plugin, kv_dtype=kv_dtype) as opened:
            blocks = _blocks(2 * count, seed=count)
            sources, targets = blocks[:count], blocks[count:]
            for group in (0, 1):
                put_in(opened, group, sources, _random(opened, group, count, seed=group))
            sources[-1] = sources[0]
            before = everything(opened)
            copy(opened, 1, sources, targets)
            wanted = blocks_of(before[1], [source - 1 for source in sources], opened.block_size)
            expect_same(opened.export(1, targets), wanted, "copies")
            expect_kept(opened, before, {1: targets})

    @pytest.mark.parametrize("kv_dtype", DTYPES)
    def test_blobs_fit_caches_of_another_block_size(
        self, plugin: Plugin, capabilities: Capabilities, kv_dtype: str
    ) -> None:
        """They are token-major: some blocks of one size are one of another."""
        sizes = sorted(capabilities.block_sizes)
        pairs = [(a, b) for a in sizes for b in sizes if a < b and b % a == 0]
        self.require(pairs, "no two block sizes are claimed of which one divides the other")
        small, large = pairs[0]
        with self.kv_session(plugin, kv_dtype=kv_dtype, block_size=small) as opened:
            blocks = list(range(1, 1 + large // small))
            put_in(opened, 0, blocks, _random(opened, 0, len(blocks), seed=3))
            blob = opened.export(0, blocks)
        with self.kv_session(plugin, kv_dtype=kv_dtype, block_size=large) as opened:
            put_in(opened, 0, [2], blob)
            expect_same(opened.export(0, [2]), blob, "a block of another size")

    @pytest.mark.parametrize("kv_dtype", DTYPES)
    def test_a_step_writes_what_its_rows_bring_and_nothing_else(
        self, plugin: Plugin, kv_dtype: str
    ) -> None:
        """Keys and values of every layer at their place; the cache's last block is one like the others."""
        with self.kv_session(plugin, kv_dtype=kv_dtype) as opened:
            texts = Texts(opened)
            for pool in texts.blocks:
                pool.free.remove(NUM_BLOCKS - 1)
                pool.free.append(NUM_BLOCKS - 1)
            all_ = [texts.add(length) for length in (opened.block_size + 3, 5, 2)]
            before = everything(opened)
            texts.prefill(*all_)
            texts.decode(*all_)
            written = {g: [b for text in all_ for b in text.blocks[g]] for g in (0, 1)}
            expect_kept(opened, before, written)
            for text in all_:
                _expect_written(texts, text)

    @pytest.mark.parametrize("kv_dtype", KV_DTYPES)
    @pytest.mark.parametrize("magnitude", [1e-2, 1e6])
    def test_numbers_out_of_the_range_are_the_nearest_in_it(
        self, plugin: Plugin, kv_dtype: str, magnitude: float
    ) -> None:
        """The largest where they are too large, and no nan or infinity; int8 finds scales that fit."""
        with self.kv_session(plugin, kv_dtype=kv_dtype) as opened:
            texts = Texts(opened, layers=Layers(opened, magnitude=magnitude))
            text = texts.add(opened.block_size + 5)
            for count, is_decode in ((len(text.ids) - 1, False), (1, True)):
                piece = texts.piece(text, count, is_decode=is_decode)
                found = opened.read(texts.layers.reader, opened.batch([piece.row]))
                assert np.isfinite(found).all()
            _expect_written(texts, text)

    @pytest.mark.parametrize("kv_dtype", DTYPES)
    def test_attention_reads_what_was_imported_and_copied(
        self, plugin: Plugin, kv_dtype: str
    ) -> None:
        """A text whose cache came from elsewhere goes on as if it had been computed here."""
        with self.kv_session(plugin, kv_dtype=kv_dtype) as opened:
            opened.fill(float("nan"))
            texts = Texts(opened)
            one = texts.add(2 * opened.block_size + 4)
            two, three = texts.add(len(one.ids)), texts.add(len(one.ids))
            two.ids, three.ids = [*one.ids], [*one.ids]
            texts.prefill(one)
            for group, pool in enumerate(texts.blocks):
                held = one.blocks[group]
                for text in (two, three):
                    text.computed = one.computed
                    text.blocks[group] = [pool.take() for _ in held]
                put_in(opened, group, two.blocks[group], opened.export(group, held))
                copy(opened, group, held, three.blocks[group])
            texts.leave(one)
            texts.decode(two, three)

    def test_a_failed_step_leaves_a_usable_cache_or_one_said_to_be_lost(
        self, plugin: Plugin
    ) -> None:
        """A lost one is freed and allocated anew."""
        with self.kv_session(plugin) as opened:
            texts = Texts(opened)
            text = texts.add(9)
            texts.prefill(text)
            victim = texts.add(5)
            whole = opened.backend.attention
            opened.backend.attention = _Failing(whole)
            failing = Texts(opened)
            failing.blocks = texts.blocks
            with pytest.raises(ValueError, match="planted"):
                failing.prefill(victim)
            opened.backend.attention = whole
            if opened.backend.kv.usable(opened.cache):
                texts.decode(text)
            else:
                _start_again(texts)

    def test_a_cache_may_be_freed_and_allocated_again(self, plugin: Plugin) -> None:
        """The core does so after profiling, before the first step."""
        with self.kv_session(plugin) as opened:
            _start_again(Texts(opened))


class _Failing(Attention):
    """Attends, and then dies: what can be written is written by then."""

    def __init__(self, whole: Attention) -> None:
        self.whole = whole

    def supports(self, spec: AttentionSpec) -> Sequence[str]:
        return self.whole.supports(spec)

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
        self.whole.attend(layer, spec, q, k, v, cache, inputs, params)
        raise ValueError("planted")


def _blocks(count: int, seed: int) -> list[int]:
    """Distinct ids, the last one of the cache among them."""
    others = random.Random(seed).sample(range(1, NUM_BLOCKS - 1), count - 1)
    return [*others, NUM_BLOCKS - 1]


def _random(session: Session, group: int, num_blocks: int, seed: int) -> KVBlob:
    """Of so many blocks."""
    held = session.launch.model.groups[group]
    return random_blob(held, num_blocks * session.block_size, seed)


def _expect_written(texts: Texts, text: Text) -> None:
    """What the cache holds of a text is what it should; a scale may be held in float16."""
    for number, blocks in enumerate(text.blocks):
        found = tokens(texts.session.export(number, blocks), 0, text.computed)
        expect_same(found, _due(texts, number, text), f"tokens in group {number}", near=2**-10)


def _due(texts: Texts, group: int, text: Text) -> KVBlob:
    """What the cache should hold of a text."""
    spec, ids = texts.groups[group], text.ids[: text.computed]
    keys, values = (
        [of_layer(layer, ids) for layer in spec.layers]
        for of_layer in (texts.layers.keys, texts.layers.values)
    )
    return KVBlob(
        keys=torch.stack([held.numbers for held in keys]),
        values=torch.stack([held.numbers for held in values]),
        heads=(0, spec.num_kv_heads),
        key_scales=_stacked_scales(keys),
        value_scales=_stacked_scales(values),
    )


def _stacked_scales(layers: Sequence[Held]) -> Tensor | None:
    scales = [held.scales for held in layers if held.scales is not None]
    return torch.stack(scales) if scales else None


def _start_again(texts: Texts) -> None:
    """Compute a text in a new cache."""
    texts.session.renew()
    texts.session.fill(float("nan"))
    again = Texts(texts.session, layers=texts.layers)
    text = again.add(20)
    again.prefill(text)
    again.decode(text)
