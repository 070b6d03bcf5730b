"""Attention against a dense oracle, over a cache in which whatever was not written is nan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from ..capabilities import Capabilities
from ..options import AttentionSpec, EngineOptions
from ..plugin import Plugin
from ..step import StepBatch, token_row
from .held import KV_DTYPES
from .rows import Row
from .session import Session
from .suite import Suite, session, small_model
from .texts import Part, Schedule, Text, Texts
from .tolerance import TOLERANCES

NAN = float("nan")
MAX_CONTEXT = 256
PLAIN = AttentionSpec(
    num_heads=4, num_kv_heads=2, head_size=64, value_size=64, scale=0.125, group=0
)
WINDOW = replace(PLAIN, window=21)
VARIANTS: Mapping[str, AttentionSpec] = {
    "a key head for two heads": PLAIN,
    "a key head a head": replace(PLAIN, num_kv_heads=4),
    "one key head": replace(PLAIN, num_kv_heads=1),
    "three key heads of nine": replace(PLAIN, num_heads=9, num_kv_heads=3),
    "a scale of its own": replace(PLAIN, scale=0.21),
    "window": WINDOW,
    "window of one token": replace(PLAIN, window=1),
    "window of a block": replace(PLAIN, window=32),
    "soft cap": replace(PLAIN, soft_cap=0.7),
    "sinks": replace(PLAIN, sinks=True),
    "alibi": replace(PLAIN, alibi=True),
    "alibi of six heads": replace(PLAIN, num_heads=6, alibi=True),
    "window and soft cap": replace(WINDOW, soft_cap=0.7),
    "window and sinks": replace(WINDOW, sinks=True),
}
RARE = ("three key heads of nine", "window of one token", "window of a block", "alibi of six heads")
HEAD_SIZES = (64, 80, 96, 128, 256)


def needed(spec: AttentionSpec) -> frozenset[str]:
    """The variants of Capabilities.attention that `spec` asks for."""
    asked = {
        "window": spec.window is not None,
        "soft_cap": spec.soft_cap is not None,
        "sinks": spec.sinks,
        "alibi": spec.alibi,
    }
    return frozenset(name for name, is_asked in asked.items() if is_asked)


class AttentionSuite(Suite):
    """Whatever a row brings, and whatever lies around it, it sees all of its own text and nothing else."""

    @contextmanager
    def attention_texts(
        self,
        plugin: Plugin,
        specs: AttentionSpec | Sequence[AttentionSpec] = PLAIN,
        *,
        dtype: str = "",
        kv_dtype: str = "auto",
        block_size: int | None = None,
        num_blocks: int = 40,
        layers_per_group: int = 1,
        seed: int = 0,
        poison: bool = False,
    ) -> Iterator[Texts]:
        """Texts in a new session whose cache is full of nan; skips where the backend refuses one of `specs`."""
        specs = (specs,) if isinstance(specs, AttentionSpec) else specs
        capabilities = plugin.capabilities(plugin.probe())
        self.require_attention(capabilities, specs)
        self.require(kv_dtype in capabilities.kv_dtypes, f"no KV cache of {kv_dtype} is claimed")
        dtype = dtype or self.base_dtype(capabilities)
        model = small_model(
            specs,
            max_context=MAX_CONTEXT,
            dtype=dtype,
            kv_dtype=None if kv_dtype == "auto" else kv_dtype,
            layers_per_group=layers_per_group,
        )
        options = EngineOptions(
            dtype=dtype, kv_dtype=kv_dtype, block_size=block_size, max_batch_rows=8
        )
        with session(plugin, model, options, num_blocks=num_blocks) as opened:
            for spec in specs:
                refusal = "; ".join(opened.backend.attention.supports(spec))
                self.require(not refusal, f"refused by supports(): {refusal}")
            opened.fill(NAN)
            yield Texts(opened, seed=seed, poison=poison)

    def require_attention(self, capabilities: Capabilities, specs: Sequence[AttentionSpec]) -> None:
        """Skip what the backend does not claim."""
        unclaimed = frozenset[str]().union(*map(needed, specs)) - capabilities.attention
        self.require(not unclaimed, f"attention does not claim {', '.join(sorted(unclaimed))}")

    def test_what_supports_says_agrees_with_the_capabilities(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        """One variant at a time."""
        dtype = self.base_dtype(capabilities)
        with session(plugin, small_model([PLAIN], dtype=dtype), EngineOptions(dtype=dtype)) as s:
            assert not s.backend.attention.supports(PLAIN), "plain attention is refused"
            for name in ("window", "soft cap", "sinks", "alibi"):
                spec = VARIANTS[name]
                refusal = s.backend.attention.supports(spec)
                claimed = needed(spec) <= capabilities.attention
                assert claimed != bool(refusal), f"{name}: claimed {claimed}, supports: {refusal}"

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_prompts_and_then_tokens_one_by_one(self, plugin: Plugin, variant: str) -> None:
        """Rows of unequal lengths, about the edge of a block; what left a window is given back."""
        if variant in RARE:
            self.thorough()
        with self.attention_texts(plugin, VARIANTS[variant]) as texts:
            all_ = [texts.add(length) for length in (36, 8, 67)]
            texts.prefill(*all_)
            if variant not in RARE:
                all_ += [texts.add(2)]
                texts.prefill(all_[-1])
            texts.decode(*all_)
            for text in all_:
                text.ids.append(5)
            texts.decode(*all_)

    @pytest.mark.parametrize("head_size", HEAD_SIZES)
    def test_heads_of_each_size(self, plugin: Plugin, head_size: int) -> None:
        """With the scale that belongs to it."""
        if head_size in (96, 256):
            self.thorough()
        spec = replace(
            PLAIN, head_size=head_size, value_size=head_size, scale=head_size**-0.5, num_heads=2
        )
        with self.attention_texts(plugin, spec) as texts:
            all_ = [texts.add(length) for length in (35, 18)]
            texts.prefill(*all_)
            texts.decode(*all_)

    def test_values_of_another_size_than_keys(self, plugin: Plugin) -> None:
        """Where supports() takes them."""
        self.thorough()
        with self.attention_texts(plugin, replace(PLAIN, value_size=32)) as texts:
            all_ = [texts.add(length) for length in (35, 18)]
            texts.prefill(*all_)
            texts.decode(*all_)

    @pytest.mark.parametrize("variant", ["a key head for two heads", "window"])
    def test_prompts_in_uneven_chunks(
        self, plugin: Plugin, capabilities: Capabilities, variant: str
    ) -> None:
        """Chunks of one token, of a block less one, of a block and one more."""
        self.require(capabilities.chunked_prefill, "prefill is not chunked here")
        with self.attention_texts(plugin, VARIANTS[variant]) as texts:
            one, two = texts.add(75), texts.add(64)
            for first, second in ((1, 31), (30, 1), (2, 16), (16, 15), (26, 1)):
                texts.step({one: first, two: second})

    @pytest.mark.parametrize("variant", ["a key head for two heads", "window"])
    def test_prompts_beside_rows_that_decode(self, plugin: Plugin, variant: str) -> None:
        """One row brings one token, the next many."""
        with self.attention_texts(plugin, VARIANTS[variant]) as texts:
            policy = texts.session.launch.shapes.batch
            self.require(policy.mixed, "prefill and decode are not mixed here")
            one, two = texts.add(45), texts.add(33)
            texts.prefill(one, two)
            three = texts.add(26)
            texts.mixed([_next(one), Part(text=three, count=25), _next(two)])
            texts.decode(three)

    def test_texts_begin_with_blocks_of_another(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        """Two rows read the same blocks, and each writes its own after them."""
        self.require(capabilities.prefix_cache, "there is no prefix cache here")
        with self.attention_texts(plugin) as texts:
            size = texts.session.block_size
            one = texts.add(size + 9)
            texts.prefill(one)
            two, three = (texts.add(size + n, prefix=one, shared=1) for n in (5, 12))
            texts.prefill(two, three)
            texts.decode(one, two, three)

    def test_each_block_size(self, plugin: Plugin, capabilities: Capabilities) -> None:
        """All that are claimed."""
        for block_size in capabilities.block_sizes:
            with self.attention_texts(plugin, block_size=block_size) as texts:
                all_ = [texts.add(length) for length in (min(2 * block_size, 200) + 1, 7)]
                texts.prefill(*all_)
                texts.decode(*all_)

    def test_each_dtype(self, plugin: Plugin, capabilities: Capabilities) -> None:
        """Of the model and of the cache: all that are claimed and have a tolerance."""
        for dtype in sorted(capabilities.dtypes & set(TOLERANCES)):
            for kv_dtype in sorted(capabilities.kv_dtypes & {"auto", *TOLERANCES, *KV_DTYPES}):
                with self.attention_texts(plugin, dtype=dtype, kv_dtype=kv_dtype) as texts:
                    all_ = [texts.add(length) for length in (41, 17)]
                    texts.prefill(*all_)
                    texts.decode(*all_)
        stated = {"auto", *TOLERANCES, *KV_DTYPES}
        others = (capabilities.dtypes | capabilities.kv_dtypes) - stated
        self.require(not others, f"no tolerance is stated for {', '.join(sorted(others))}")

    @pytest.mark.parametrize("kv_dtype", KV_DTYPES)
    @pytest.mark.parametrize("variant", ["a key head for two heads", "window and sinks", "alibi"])
    def test_keys_and_values_of_one_byte(
        self, plugin: Plugin, capabilities: Capabilities, kv_dtype: str, variant: str
    ) -> None:
        """What a row sees is what the cache holds, of its own tokens too, however its prompt is cut; scales left behind
        are nan.
        """
        if variant != "a key head for two heads":
            self.thorough()
        spec = VARIANTS[variant]
        with self.attention_texts(
            plugin, spec, kv_dtype=kv_dtype, layers_per_group=2, num_blocks=14, poison=True
        ) as texts:
            one, two = texts.add(44), texts.add(19)
            if capabilities.chunked_prefill:
                texts.step({one: 17, two: 1})
            texts.prefill(one, two)
            texts.decode(one, two)
            texts.session.overwrite(0, [0], NAN)
            texts.leave(two)
            three = texts.add(30)
            texts.prefill(three)
            one.ids.append(9)
            texts.decode(one, three)

    @pytest.mark.parametrize("value", [NAN, 3e4])
    def test_the_null_block_reaches_no_row(self, plugin: Plugin, value: float) -> None:
        """Whatever lies there, and however many entries of the tables point to it."""
        with self.attention_texts(plugin) as texts:
            all_ = [texts.add(length) for length in (90, 3, 34)]
            texts.prefill(*all_)
            for _ in range(2):
                texts.session.overwrite(0, [0], value)
                texts.decode(*all_)
                for text in all_:
                    text.ids.append(7)

    def test_recycled_blocks_reach_no_row(self, plugin: Plugin) -> None:
        """Blocks that left a window, or whose text has ended, are full of nan and soon another's."""
        variants = plugin.capabilities(plugin.probe()).attention
        spec = WINDOW if "window" in variants else PLAIN
        with self.attention_texts(plugin, spec, num_blocks=14, poison=True) as texts:
            one, two = texts.add(70), texts.add(40)
            texts.prefill(one, two)
            for _ in range(3):
                texts.decode(one, two)
                one.ids.append(9)
                two.ids.append(11)
            texts.leave(one)
            three = texts.add(60)
            texts.prefill(three)
            texts.decode(two, three)

    def test_groups_and_layers_keep_apart(self, plugin: Plugin, capabilities: Capabilities) -> None:
        """Two KV groups, each with a table of its own, of two layers each."""
        second = WINDOW if "window" in capabilities.attention else PLAIN
        specs = (PLAIN, replace(second, num_kv_heads=1, group=1))
        with self.attention_texts(plugin, specs, layers_per_group=2) as texts:
            all_ = [texts.add(length) for length in (50, 21)]
            texts.prefill(*all_)
            texts.decode(*all_)

    def test_what_padding_gives_is_finite(self, plugin: Plugin) -> None:
        """A step of padding alone, and the padding tokens of a step that has them."""
        with self.attention_texts(plugin) as texts:
            opened, reader = texts.session, texts.layers.reader
            rows = [_row(opened, number, length) for number, length in enumerate((3, 9, 6))]
            for rows_ in (rows[:1], rows):
                if not opened.can_hold(rows_):
                    continue
                bucket = opened.fit(rows_)
                nothing = opened.batch((), bucket=bucket)
                seen = replace(nothing, num_logits=bucket.num_logits)
                assert np.isfinite(opened.read(reader, seen)).all(), "a step of padding alone"
                batch = opened.batch(rows_, bucket=bucket)
                layout = opened.launch.shapes.batch.token_layout
                spare = bucket.num_logits - batch.num_logits
                padding = np.flatnonzero(token_row(batch, layout) < 0)[:spare]
                if padding.size:
                    seen = _beside(batch, padding)
                    assert np.isfinite(opened.read(reader, seen)).all(), "padding tokens"

    @pytest.mark.parametrize("seed", range(6))
    def test_random_schedules(self, plugin: Plugin, capabilities: Capabilities, seed: int) -> None:
        """Texts come, are computed in whatever parts are allowed, decode, and go; blocks are scarce."""
        if seed:
            self.thorough()
        kinds = [
            ("window", WINDOW),
            ("soft_cap", VARIANTS["soft cap"]),
            ("sinks", VARIANTS["sinks"]),
        ]
        claimed = [spec for name, spec in kinds if name in capabilities.attention]
        specs = [PLAIN, *(replace(spec, group=1) for spec in claimed[seed % 3 :][:1])]
        with self.attention_texts(plugin, specs, num_blocks=26, seed=seed, poison=True) as texts:
            Schedule(texts).run(12 if self.is_quick else 30)


def _next(text: Text) -> Part:
    return Part(text=text, count=1, is_decode=True)


def _beside(batch: StepBatch, padding: NDArray[np.intp]) -> StepBatch:
    """`batch` with rows of logits for `padding` tokens too."""
    mine = batch.logit_index[: batch.num_logits]
    index = np.zeros_like(batch.logit_index)
    index[: mine.size + padding.size] = np.sort(np.concatenate((mine, padding)))
    return replace(batch, logit_index=index, num_logits=mine.size + padding.size)


def _row(opened: Session, number: int, length: int) -> Row:
    """A prompt of its own block in each group."""
    blocks = tuple((number + 1,) for _ in opened.launch.model.groups)
    return Row(token_ids=tuple(range(length)), blocks=blocks, slot=number)
