"""Request slots, and the memory that blocks may have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from ..capabilities import Capabilities
from ..kv_cache import IN_PROMPT
from ..options import EngineOptions
from ..plugin import Plugin
from ..shapes import BatchShape
from ..step import I32
from .bench import Bench
from .drawing import Drawing
from .rows import Row
from .session import Session, make_launch
from .suite import Suite, session, small_model
from .tokens import decode_rows, num_held

VOCAB = 128
BEST, SECOND, THIRD = 17, 99, 3
"""Token ids by their logits."""
FREQUENCY = (1.0, 2.0, 0.0)
"""Penalties that lower a token by 2 each time that it was drawn."""


class SlotsSuite(Suite):
    """Every request that runs holds a slot, where its last drawn id and its token counts live."""

    @contextmanager
    def slots_bench(self, plugin: Plugin) -> Iterator[Bench]:
        """Logits whose best three are 3, 2 and 1.5, all others 0; four slots."""
        capabilities = plugin.capabilities(plugin.probe())
        logits = np.zeros((VOCAB, VOCAB), np.float32)
        logits[:, [BEST, SECOND, THIRD]] = 3.0, 2.0, 1.5
        dtype = self.base_dtype(capabilities)
        model = small_model(vocab_size=VOCAB, dtype=dtype)
        with session(plugin, model, EngineOptions(dtype=dtype, max_batch_rows=4)) as opened:
            yield Bench(
                session=opened,
                logits=logits,
                reader=opened.table(torch.from_numpy(logits)),
                num_held=num_held(opened),
            )

    def need_feature(self, capabilities: Capabilities, feature: str) -> None:
        """Skip where the backend does not claim `feature`."""
        self.require(feature in capabilities.features, f"{feature} not claimed")

    def test_counts_that_a_slot_is_reset_to_lower_the_next_draw(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        """Those of its own request, in the first slot and the last; the array stays the caller's."""
        self.need_feature(capabilities, "penalties")
        with self.slots_bench(plugin) as bench:
            for slot in (0, 3):
                others = _counts({})
                for other in {0, 1, 2, 3} - {slot}:
                    bench.reset(other, others)
                counts = _counts({BEST: 1, SECOND: 1})
                bench.reset(slot, counts)
                counts[:] = 0
                assert _draw(bench, [slot]) == [THIRD]
                assert _draw(bench, [2 if slot != 2 else 1]) == [BEST]

    def test_what_the_prompt_holds_is_not_counted_as_drawn(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        """IN_PROMPT concerns repetition alone; times drawn are added to it."""
        self.need_feature(capabilities, "penalties")
        with self.slots_bench(plugin) as bench:
            bench.reset(1, _counts({BEST: IN_PROMPT, SECOND: IN_PROMPT + 1}))
            assert _draw(bench, [1]) == [BEST]
            assert _draw(bench, [1], penalties=(4.0, 0.0, 0.0)) == [THIRD]

    def test_draws_count_in_the_slot_that_drew(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        """From draw to draw, whichever row of a step the slot has."""
        self.need_feature(capabilities, "penalties")
        with self.slots_bench(plugin) as bench:
            for slot in range(4):
                bench.reset(slot, _counts({}))
            assert _draw(bench, [2]) == [BEST]
            assert _draw(bench, [2]) == [SECOND]
            assert _draw(bench, [0]) == [BEST]
            assert _draw(bench, [2]) == [THIRD]
            assert _draw(bench, [0]) == [SECOND]

    def test_a_recycled_slot_starts_from_nothing(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        """Once it is reset; what another request drew there is gone."""
        self.need_feature(capabilities, "penalties")
        with self.slots_bench(plugin) as bench:
            bench.reset(1, _counts({}))
            _draw(bench, [1])
            _draw(bench, [1])
            bench.reset(1, _counts({}))
            assert _draw(bench, [1]) == [BEST]

    def test_a_slot_without_penalties_is_not_lowered_by_what_is_left_there(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        """In whatever variant it is drawn."""
        self.need_feature(capabilities, "penalties")
        with self.slots_bench(plugin) as bench:
            bench.reset(1, _counts({BEST: 3, SECOND: 1}))
            bench.reset(1, None)
            drawn = bench.draw([Drawing(slot=1)], capabilities.features)
            assert np.asarray(drawn.ids).tolist() == [BEST]
            assert _draw(bench, [1], penalties=(1.0, 0.0, 0.0)) == [BEST]

    def test_the_sink_slot_may_be_reset(self, plugin: Plugin, capabilities: Capabilities) -> None:
        """As before freeze: with zeros and with None; no request notices."""
        with self.slots_bench(plugin) as bench:
            bench.reset(bench.num_slots, None)
            if "penalties" in capabilities.features:
                bench.reset(0, _counts({}))
                bench.reset(bench.num_slots, _counts({BEST: 5}))
                assert _draw(bench, [0]) == [BEST]

    def test_a_row_may_bring_the_token_that_its_slot_drew_last(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        """By token_slot, whatever token_ids says; rows that bring their own are left alone."""
        self.require(capabilities.overlapped_steps, "steps do not overlap here")
        with self.slots_bench(plugin) as bench:
            opened = bench.session
            values = torch.arange(VOCAB, dtype=torch.float32)[:, None].repeat(1, 2)
            for slot in (0, 3):
                bench.draw([Drawing(slot=slot)])
            reader = opened.table(values)
            rows = decode_rows(opened, [7, 8, 9], [3, 1, 0])
            for some in [rows] if opened.can_hold(rows) else [[row] for row in rows]:
                batch = opened.batch(some)
                assert batch.token_slot is not None
                first = np.flatnonzero(np.isin(batch.token_ids, [7, 9]))
                token_slot = batch.token_slot.copy()
                token_slot[first] = [{7: 3, 9: 0}[batch.token_ids[at]] for at in first]
                found = opened.read(reader, replace(batch, token_slot=token_slot))
                wanted = [8 if row.slot == 1 else BEST for row in some]
                assert found[:, 0].tolist() == wanted

    def test_the_budget_is_a_number_of_bytes_that_the_device_has(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        """Found by running the largest step where it is profiled, and else without; some blocks fit."""
        with self.slots_bench(plugin) as bench:
            opened = bench.session
            _drop(opened)
            ran: list[int] = []
            step = None
            if capabilities.kv_budget == "profile":

                def step() -> None:
                    ran.append(_run_largest(bench))

            with torch.inference_mode():
                found = opened.backend.kv.budget(0.9, step)
            memory = opened.backend.runtime.memory()
            assert isinstance(found, int)
            assert found >= sum(map(opened.backend.kv.block_bytes, opened.launch.model.groups))
            assert memory is None or found <= memory.total
            if step is not None:
                assert ran, "the largest step was not run"
                assert sum(ran), "ShapePolicy.largest names no step, so nothing was measured"

    def test_a_predicted_budget_depends_on_options_and_model_alone(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        """For the size of the cache is part of every graph."""
        is_part = capabilities.kv_budget == "predict" and capabilities.graphs != "none"
        self.require(is_part, "no graph depends on a predicted size here")
        found = set()
        for _ in range(2):
            launch = make_launch(plugin, small_model(), EngineOptions(max_batch_rows=4))
            backend = plugin.create(launch)
            found |= {backend.kv.budget(0.9, None), backend.kv.budget(0.9, None)}
            held = backend.runtime.put(torch.zeros(2**20))
            found.add(backend.kv.budget(0.9, None))
            del held
            backend.close()
        assert len(found) == 1, f"budgets of {sorted(found)} bytes for the same launch"


def _counts(drawn: dict[int, int]) -> I32:
    counts = np.zeros(VOCAB, np.int32)
    for token, count in drawn.items():
        counts[token] = count
    return counts


def _draw(
    bench: Bench, slots: Sequence[int], penalties: tuple[float, float, float] = FREQUENCY
) -> list[int]:
    drawings = [Drawing(slot=slot, penalties=penalties) for slot in slots]
    drawn = bench.draw(drawings, frozenset({"penalties"}))
    return [int(token) for token in np.asarray(drawn.ids)]


def _drop(opened: Session) -> None:
    opened.backend.kv.free(opened.cache)
    opened.cache = None


def _run_largest(bench: Bench) -> int:
    """How many steps ShapePolicy.largest has, each run on a cache of two blocks."""
    opened = bench.session
    opened.num_blocks = 2
    opened.plans = [replace(plan, num_blocks=2) for plan in opened.plans]
    opened.renew()
    largest = opened.launch.shapes.largest()
    features = max(opened.launch.shapes.draw_variants() or [frozenset[str]()], key=len)
    for shape in largest:
        bucket = opened.launch.shapes.fit(shape)
        batch = opened.batch(_rows_of(shape, opened), bucket=bucket, features=features)
        opened.draw(bench.reader, batch)
    _drop(opened)
    return len(largest)


def _rows_of(shape: BatchShape, opened: Session) -> list[Row]:
    """Rows of that shape whose tables point to block 1."""
    rows, left = [], shape.num_tokens
    width = -(-shape.max_context // opened.block_size)
    for index in range(shape.num_rows):
        count = max(1, min(shape.max_query, left - (shape.num_rows - index - 1)))
        left -= count
        rows.append(
            Row(
                token_ids=(0,) * count,
                start=shape.max_context - count,
                blocks=((1,) * width,) * len(opened.plans),
                slot=index,
            )
        )
    return rows
