"""Steps as a whole: compiled once, waited for once, and nobody else's affair."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from ..capabilities import Capabilities
from ..errors import UnexpectedCompile
from ..options import AttentionSpec, EngineOptions
from ..plugin import Plugin
from ..runtime import Pending
from ..shapes import Bucket
from ..step import I32, StepBatch, StepOutput
from .session import Session
from .suite import Suite, session, small_model
from .texts import Part, Piece, Schedule, Texts

SPEC = AttentionSpec(num_heads=2, num_kv_heads=1, head_size=64, value_size=64, scale=0.125, group=0)
"""Whose two heads of 64 are the logits of 128 tokens."""
MARGIN = 0.02
"""Two logits nearer than this may swap in float32's coarsest kernels; such draws are not compared."""
NUM_BLOCKS = 40
Run = tuple[Bucket, frozenset[str]]


class DrawnTexts(Texts):
    """Texts whose steps draw greedily from what attention gives, in variants by chance; some draw nothing."""

    draws_always = True
    """Every step draws, in the variant without features."""

    def batch(self, pieces: Sequence[Piece], features: frozenset[str] = frozenset()) -> StepBatch:
        """The step of `pieces`."""
        rows = [piece.row for piece in pieces]
        where = {
            "slot": np.array([row.slot for row in rows], np.int32),
            "position": np.array([row.end for row in rows], np.int32),
        }
        return self.session.batch(rows, features=features, sampling=where)

    def take(self, pieces: Sequence[Piece]) -> None:
        """One step; what it draws is compared."""
        rows = [piece.row for piece in pieces]
        may_be_chunks = self.session.launch.capabilities.chunked_prefill and not any(
            row.is_decode for row in rows
        )
        if may_be_chunks and not self.draws_always and self.random.random() < 0.4:
            self.session.run(self.layers.reader, self.session.batch(rows, logits="none"))
            return
        variants = () if self.draws_always else self.session.launch.shapes.draw_variants()
        features = self.random.choice(variants) if variants else frozenset[str]()
        drawn = self.session.draw(self.layers.reader, self.batch(pieces, features))
        self.expect(pieces, np.asarray(drawn.ids))

    def start(self, *parts: Part) -> tuple[list[Piece], StepBatch, Pending[StepOutput]]:
        """The first step of `parts`, not waited for."""
        pieces = next(iter(self._steps(parts)))
        batch = self.batch(pieces)
        return pieces, batch, self.session.start(self.layers.reader, batch)

    def expect(self, pieces: Sequence[Piece], ids: I32) -> None:
        """`ids` are the best of each row, where there is one clear best."""
        for piece, found in zip(pieces, ids[: len(pieces)], strict=True):
            end = piece.row.end
            logits = self.layers.expected(piece.text.ids[:end], end - 1)[0]
            second, best = np.sort(logits)[-2:]
            wanted = int(np.argmax(logits))
            assert found == wanted or best - second < MARGIN, (
                f"token {end} of the text in slot {piece.row.slot} is {found}, should be {wanted}"
            )


class StepsSuite(Suite):
    """A model of one attention layer whose values are its logits."""

    @contextmanager
    def drawn_texts(self, plugin: Plugin) -> Iterator[DrawnTexts]:
        """In a new session whose cache is full of nan."""
        dtype = self.base_dtype(plugin.capabilities(plugin.probe()))
        model = small_model([SPEC], max_context=128, dtype=dtype)
        options = EngineOptions(dtype=dtype, max_batch_rows=4, max_context=96, max_batch_tokens=96)
        with session(plugin, model, options, num_blocks=NUM_BLOCKS) as opened:
            opened.fill(float("nan"))
            yield DrawnTexts(opened)

    def test_no_step_compiles_after_warm_up(self, plugin: Plugin) -> None:
        """Random traffic over every shape and variant that was declared."""
        with self.drawn_texts(plugin) as texts:
            warm_up(texts)
            texts.draws_always = False
            with texts.session.backend.compiler.freeze():
                Schedule(texts, longest=95).run(20 if self.is_quick else 120)
                told = texts.session.backend.telemetry.counters()
                assert not told.get("compiles_after_freeze", 0)

    def test_a_shape_that_was_not_declared_is_refused_and_nothing_is_lost(
        self, plugin: Plugin
    ) -> None:
        """UnexpectedCompile, before the cache is given away."""
        with self.drawn_texts(plugin) as texts:
            opened = texts.session
            declared = opened.launch.shapes.buckets(NUM_BLOCKS)
            prompt = opened.fit([texts.piece(texts.add(5), 5).row])
            self.require(prompt in declared, "shapes are dynamic here")
            warm_up(texts)
            with opened.backend.compiler.freeze():
                text = texts.add(9)
                texts.prefill(text)
                is_rows = opened.launch.shapes.batch.token_layout == "rows"
                largest = max(declared, key=lambda b: (b.num_rows, b.num_tokens, b.num_logits))
                other = replace(
                    largest,
                    num_rows=largest.num_rows + 1,
                    num_tokens=largest.num_tokens + (largest.max_query if is_rows else 1),
                    num_logits=largest.num_logits + 1,
                )
                with pytest.raises(UnexpectedCompile):
                    opened.draw(texts.layers.reader, opened.batch((), bucket=other))
                texts.decode(text)

    def test_a_step_that_draws_waits_once(self, plugin: Plugin) -> None:
        """In result(), where the device is read at most once per dtype; each dtype goes up in one copy."""
        with self.drawn_texts(plugin) as texts:
            watch, features = texts.session.watch, texts.session.launch.capabilities.features
            one, two = texts.add(30), texts.add(9)
            texts.prefill(one, two)
            for variant in (frozenset[str](), features):
                pieces = [texts.piece(text, 1, is_decode=True) for text in (one, two)]
                batch = texts.batch(pieces, variant)
                texts.session.draw(texts.layers.reader, batch)  # compiles, if anything does
                before = watch.counts()
                pending = texts.session.start(texts.layers.reader, batch)
                started = watch.counts() - before
                assert (started.waits, started.synchronizes, started.reads) == (0, 0, 0)
                assert started.uploads <= 2, f"{started.uploads} copies to the device, of 2 dtypes"
                texts.expect(pieces, np.asarray(pending.result().ids))
                found = watch.counts() - before
                assert found.waits == 1
                assert found.synchronizes == 0
                assert found.reads <= 3, f"{found.reads} copies from the device, of 3 dtypes"
                assert found.reads_outside == 0, "the device was read outside result()"
                assert found.refused == 0, "the device refused something"
                one.ids.append(3)
                two.ids.append(4)

    def test_steps_that_draw_nothing_are_not_waited_for(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        """Any number of them may be under way; what they wrote is there."""
        self.require(capabilities.chunked_prefill, "every step draws where prefill is not chunked")
        with self.drawn_texts(plugin) as texts:
            opened = texts.session
            all_ = [texts.add(length) for length in (12, 33, 7, 20)]
            steps = [
                opened.batch([texts.piece(text, len(text.ids) - 1).row], logits="none")
                for text in all_
            ]
            before = opened.watch.counts()
            for batch in steps:
                opened.run(texts.layers.reader, batch)
            found = opened.watch.counts() - before
            assert (found.waits, found.synchronizes, found.reads) == (0, 0, 0)
            texts.decode(*all_)

    def test_prepare_waits_for_nothing(self, plugin: Plugin) -> None:
        """At most one copy per dtype, and nothing is read."""
        with self.drawn_texts(plugin) as texts:
            watch = texts.session.watch
            batch = texts.batch([texts.piece(texts.add(9), 9)])
            before = watch.counts()
            with torch.inference_mode():
                texts.session.backend.prepare(batch)
            found = watch.counts() - before
            assert (found.waits, found.synchronizes, found.reads, found.refused) == (0, 0, 0, 0)
            assert found.uploads <= 2, f"{found.uploads} copies to the device, of 2 dtypes"

    def test_a_step_leaves_its_batch_as_it_was(self, plugin: Plugin) -> None:
        """The arrays are the caller's."""
        with self.drawn_texts(plugin) as texts:
            batch = texts.batch([texts.piece(texts.add(9), 9)])
            before = {name: array.copy() for name, array in _arrays(batch).items()}
            texts.session.draw(texts.layers.reader, batch)
            for name, array in _arrays(batch).items():
                assert np.array_equal(array, before[name]), f"{name} was written to"

    def test_what_was_fetched_stays_when_the_next_step_runs(self, plugin: Plugin) -> None:
        """A step may overwrite the device's outputs of the one before, not what the host holds."""
        with self.drawn_texts(plugin) as texts:
            one, two = texts.add(21), texts.add(21)
            pieces, _, pending = texts.start(Part(text=one, count=21))
            held = pending.result()
            ids = np.array(held.ids)
            texts.prefill(two)
            texts.decode(two)
            assert np.array_equal(np.asarray(held.ids), ids)
            texts.expect(pieces, ids)

    def test_a_result_may_be_waited_for_in_another_thread(self, plugin: Plugin) -> None:
        """One thread drives the backend; another may take what comes."""
        with self.drawn_texts(plugin) as texts:
            pieces, _, pending = texts.start(Part(text=texts.add(17), count=17))
            found: list[StepOutput] = []
            thread = threading.Thread(target=lambda: found.append(pending.result()))
            thread.start()
            thread.join()
            assert found, "result() raised in another thread"
            texts.expect(pieces, np.asarray(found[0].ids))

    def test_a_step_may_start_before_the_one_before_is_fetched(self, plugin: Plugin) -> None:
        """Each result is that of its own step, whichever is asked for first."""
        with self.drawn_texts(plugin) as texts:
            claimed = texts.session.launch.capabilities.overlapped_steps
            self.require(claimed, "steps do not overlap here")
            one, two = texts.add(21), texts.add(13)
            for order in ((0, 1), (1, 0)):
                started = [
                    texts.start(Part(text=text, count=len(text.ids) - 2 - text.computed))
                    if not text.computed
                    else texts.start(Part(text=text, count=1, is_decode=True))
                    for text in (one, two)
                ]
                for index in order:
                    pieces, _, pending = started[index]
                    texts.expect(pieces, np.asarray(pending.result().ids))

    def test_a_step_may_be_repeated_in_halves(self, plugin: Plugin) -> None:
        """What a step writes are slots of its own rows, so the core may look for the request at fault."""
        with self.drawn_texts(plugin) as texts:
            all_ = [texts.add(length) for length in (18, 5, 40)]
            texts.prefill(*all_)
            pieces = [texts.piece(text, 1, is_decode=True) for text in all_]
            for some in (pieces, pieces[:1], pieces[1:], pieces[2:], pieces):
                texts.take(some)

    def test_each_wrapped_module_is_run_itself(self, plugin: Plugin) -> None:
        """Two of the same name and shapes, which read different tables."""
        with self.drawn_texts(plugin) as texts:
            opened = texts.session
            batch = texts.batch([texts.piece(texts.add(9), 9)])
            vocab_size = opened.launch.model.vocab_size
            readers = [opened.table(torch.full((vocab_size, 8), value)) for value in (1.0, 2.0)]
            found = [opened.read(reader, batch)[0, 0] for reader in (*readers, readers[0])]
            assert found == [1.0, 2.0, 1.0], f"the table of another module was read: {found}"

    def test_torch_is_left_as_it_was(self, plugin: Plugin) -> None:
        """No global state changes after create()."""
        with self.drawn_texts(plugin) as texts:
            before = _state()
            text = texts.add(9)
            texts.prefill(text)
            texts.decode(text)
            assert _state() == before


def warm_up(texts: Texts) -> None:
    """As the core does before freeze: each bucket with each variant, on padding alone."""
    opened, kv = texts.session, texts.session.backend.kv
    sink = opened.launch.options.max_batch_rows
    with torch.inference_mode():
        opened.cache = kv.reset_slot(opened.cache, sink, None)
    runs, ran, finished = _runs(opened), list[Run](), list[int]()

    def run(bucket: Bucket, features: frozenset[str]) -> None:
        batch = opened.batch((), bucket=bucket, features=features)
        opened.start(texts.layers.reader, batch).result()
        ran.append((bucket, features))

    with torch.inference_mode():
        report = opened.backend.compiler.warm_up(runs, run, finished.append)
    assert report.num_graphs >= 0
    missing = set(runs) - set(ran)
    assert not missing, f"{len(missing)} of {len(runs)} declared runs were never made"


def _runs(opened: Session) -> list[Run]:
    """Each bucket with each variant; where drawing is a graph of its own, each variant once per L."""
    shapes = opened.launch.shapes
    buckets, variants = shapes.buckets(opened.num_blocks), shapes.draw_variants()
    runs: list[Run] = []
    drawn: set[tuple[int, frozenset[str]]] = set()
    for bucket in buckets:
        fresh = [v for v in variants if (bucket.num_logits, v) not in drawn]
        if opened.launch.capabilities.fused_draw:
            fresh = list(variants)
        drawn |= {(bucket.num_logits, variant) for variant in fresh}
        runs += [(bucket, variant) for variant in fresh or [frozenset[str]()]]
    return runs


def _arrays(batch: StepBatch) -> dict[str, np.ndarray]:
    """Every array of a batch, by name."""
    found = {
        f"{type(value).__name__}.{name}": getattr(value, name)
        for value in (batch, batch.sampling)
        for name in value.__dataclass_fields__
        if isinstance(getattr(value, name), np.ndarray)
    }
    return found | {f"block_table{g}": table for g, table in enumerate(batch.block_table)}


def _state() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )
