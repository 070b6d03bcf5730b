"""Drawing: greedy and sampled, filtered, penalised, biased, masked and scored, against definitions in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from ..kv_cache import IN_PROMPT
from ..options import EngineOptions
from ..plugin import Plugin
from ..step import I32
from .bench import Bench
from .drawing import Drawing, chi_square, drawn_from, softmax
from .rows import Row
from .suite import Suite, session, small_model
from .tokens import num_held

VOCAB = 700
"""No multiple of 32, so that the last word of a bitmask is part padding; above what a partial sort may look at."""
NUM_ROWS = 16
"""Rows of logits in the table; the last four are nearly flat, so that filters keep hundreds of ids."""
FILTERS: Mapping[str, Drawing] = {
    "temperature": Drawing(temperature=1.7),
    "cold": Drawing(temperature=0.3),
    "top_k": Drawing(temperature=1.0, top_k=5),
    "top_k of 1": Drawing(temperature=1.0, top_k=1),
    "top_p": Drawing(temperature=1.0, top_p=0.8),
    "top_p of nearly all": Drawing(temperature=1.5, top_p=0.97),
    "top_p of nearly none": Drawing(temperature=1.0, top_p=1e-4),
    "min_p": Drawing(temperature=1.0, min_p=0.05),
    "typical_p": Drawing(temperature=1.0, typical_p=0.5),
    "all filters": Drawing(temperature=1.3, top_k=40, top_p=0.9, typical_p=0.8, min_p=0.02),
}
PENALTIES: Mapping[str, tuple[float, float, float]] = {
    "repetition": (1.7, 0.0, 0.0),
    "repetition below 1": (0.6, 0.0, 0.0),
    "frequency": (1.0, 0.9, 0.0),
    "presence": (1.0, 0.0, 1.3),
    "all": (1.3, 0.4, -0.8),
}
SEEDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 7 * 2**32 + 5, 2**63 + 12345, 2**64 - 1)
POSITIONS = (0, 1, 2, 500, 2**20)


class SamplerSuite(Suite):
    """The sampler."""

    @pytest.fixture
    def draws(self, plugin: Plugin) -> Iterator[Bench]:
        """A session, and logits to draw from."""
        generator = np.random.default_rng(1)
        logits = generator.normal(0, 3, (NUM_ROWS, VOCAB)).astype(np.float32)
        logits[-4:] /= 6
        options = EngineOptions(dtype="float32", max_batch_rows=8)
        with session(plugin, small_model(vocab_size=VOCAB), options) as opened:
            reader = opened.table(torch.from_numpy(logits))
            yield Bench(session=opened, logits=logits, reader=reader, num_held=num_held(opened))

    def need(self, draws: Bench, *features: str) -> None:
        """Skip where the backend does not claim `features`."""
        missing = set(features) - draws.session.launch.capabilities.features
        self.require(not missing, f"{', '.join(sorted(missing))} not claimed")

    def test_a_greedy_row_takes_its_largest_logit(self, draws: Bench) -> None:
        drawings = [Drawing(row=row) for row in range(NUM_ROWS)]
        draws.expect(drawings, draws.draw(drawings))

    def test_a_greedy_row_among_variants_of_all_features_takes_its_largest_logit(
        self, draws: Bench
    ) -> None:
        everything = draws.session.launch.capabilities.features
        drawings = [Drawing(row=row) for row in range(NUM_ROWS)]
        draws.expect(drawings, draws.draw(drawings, everything))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_noise_is_what_the_contract_defines(self, draws: Bench, seed: int) -> None:
        self.need(draws, "sampled")
        if seed not in SEEDS[3:8]:
            self.thorough()
        drawings = [
            Drawing(row=row, temperature=1.0, seed=seed, position=position)
            for row in (0, NUM_ROWS - 1)
            for position in POSITIONS
        ]
        draws.expect(drawings, draws.draw(drawings))

    @pytest.mark.parametrize("kind", [*FILTERS])
    def test_what_is_kept_and_drawn_is_what_the_filters_define(
        self, draws: Bench, kind: str
    ) -> None:
        self.need(draws, *FILTERS[kind].features)
        claimed = draws.session.launch.capabilities.features
        rows = (0, 1, NUM_ROWS - 1, NUM_ROWS - 2) * (1 if self.is_quick else 8)
        drawings = [
            replace(FILTERS[kind], row=row, seed=91 + index, of_drawn="logprobs" in claimed)
            for index, row in enumerate(rows)
        ]
        draws.expect(drawings, draws.draw(drawings))

    @pytest.mark.parametrize("kind", ["temperature", "top_k", "top_p", "min_p", "typical_p"])
    def test_draws_at_many_positions_follow_the_distribution(self, draws: Bench, kind: str) -> None:
        self.need(draws, *FILTERS[kind].features)
        if kind != "top_k":
            self.thorough()
        drawings = [
            replace(FILTERS[kind], row=2, seed=2**40 + 3, position=position)
            for position in range(256 if self.is_quick else 1024)
        ]
        share = softmax(drawn_from(draws.logits[2], drawings[0]))
        ids = np.asarray(draws.draw(drawings).ids)
        outside = sorted(set(ids[share[ids] == 0].tolist()))
        assert not outside, f"ids that {kind} should have left out were drawn: {outside}"
        statistic, limit = chi_square(np.bincount(ids, minlength=VOCAB), share)
        assert statistic < limit, f"chi-square {statistic:.1f}, where at most {limit:.1f} is chance"

    def test_a_draw_is_the_same_in_every_batch_row_and_slot(self, draws: Bench) -> None:
        self.need(draws, "sampled")
        wanted = Drawing(row=3, temperature=1.1, seed=2**35 + 77, position=12)
        alone = np.asarray(draws.draw([wanted]).ids)[0]
        most = draws.num_held
        for count in range(2, most + 1, max(1, (most - 2) // 2) if self.is_quick else 1):
            others = [Drawing(row=9, temperature=0.7, seed=i, position=i) for i in range(count)]
            for place in {0, count // 2, count - 1}:
                slot = (place + 3) % draws.num_slots
                slots = [other for other in range(draws.num_slots) if other != slot]
                drawings = [replace(o, slot=s) for o, s in zip(others, slots, strict=False)]
                drawings.insert(place, replace(wanted, slot=slot))
                drawn = np.asarray(draws.draw(drawings[:count]).ids)[place]
                assert drawn == alone, f"row {place} of {count} draws {drawn}, alone {alone}"

    def test_positions_and_seeds_give_other_draws(self, draws: Bench) -> None:
        self.need(draws, "sampled")
        flat = Drawing(row=NUM_ROWS - 1, temperature=5.0, seed=5)
        by_position = [replace(flat, position=position) for position in range(8)]
        by_seed = [replace(flat, seed=seed << 32) for seed in range(8)]
        for drawings in (by_position, by_seed):
            ids = np.asarray(draws.draw(drawings).ids)
            assert len(set(ids.tolist())) > 4, f"of eight draws most are equal: {ids}"

    @pytest.mark.parametrize("kind", [*PENALTIES])
    def test_penalties_are_those_of_the_definitions(self, draws: Bench, kind: str) -> None:
        self.need(draws, "penalties")
        counts = {slot: some_counts(slot) for slot in range(2)}
        for slot, held in counts.items():
            draws.reset(slot, held)
        drawings = [
            Drawing(row=slot, slot=slot, penalties=PENALTIES[kind], of_drawn=self.scored(draws))
            for slot in counts
        ]
        draws.expect(drawings, draws.draw(drawings), counts)

    def test_drawn_tokens_are_counted_step_by_step(self, draws: Bench) -> None:
        self.need(draws, "penalties")
        counts = {slot: some_counts(slot) for slot in range(3)}
        for slot, held in counts.items():
            draws.reset(slot, held)
        drawings = [
            Drawing(row=row, slot=slot, penalties=(1.0, 1.1, 0.4), of_drawn=self.scored(draws))
            for slot, row in enumerate((4, NUM_ROWS - 1, 4))
        ]
        for _ in range(6):
            output = draws.draw(drawings)
            draws.expect(drawings, output, counts)
            for slot, token in enumerate(np.asarray(output.ids).tolist()):
                counts[slot][token] += 1

    def test_a_slot_taken_anew_has_the_counts_it_was_given(self, draws: Bench) -> None:
        self.need(draws, "penalties")
        slot = draws.num_slots - 1
        drawing = Drawing(row=5, slot=slot, penalties=(1.5, 1.0, 1.0), of_drawn=self.scored(draws))
        draws.reset(slot, some_counts(0) + some_counts(1))
        draws.draw([drawing])
        for counts in (np.zeros(VOCAB, np.int32), some_counts(2)):
            draws.reset(slot, counts)
            draws.expect([drawing], draws.draw([drawing]), {slot: counts})

    def test_counts_left_in_a_slot_change_nothing_for_a_request_without_penalties(
        self, draws: Bench
    ) -> None:
        self.need(draws, "penalties")
        best = int(np.argmax(draws.logits[6]))
        counts = np.zeros(VOCAB, np.int32)
        counts[best] = IN_PROMPT + 1000
        draws.reset(1, counts)
        draws.reset(1, None)
        drawing = Drawing(row=6, slot=1, of_drawn=self.scored(draws))
        draws.expect([drawing], draws.draw([drawing], frozenset({"penalties"})), {1: counts})

    def test_what_is_drawn_for_the_sink_counts_for_nobody(self, draws: Bench) -> None:
        self.need(draws, "penalties")
        counts = {slot: np.zeros(VOCAB, np.int32) for slot in (0, draws.num_slots - 1)}
        for slot, held in counts.items():
            draws.reset(slot, held)
        drawings = [
            Drawing(row=7, slot=slot, penalties=(2.0, 3.0, 3.0), of_drawn=self.scored(draws))
            for slot in counts
        ]
        for _ in range(2):
            draws.draw([replace(drawing, for_sink=True) for drawing in drawings])
        draws.expect(drawings, draws.draw(drawings), counts)

    def test_a_bias_is_added_to_the_tokens_it_names_and_to_no_other(self, draws: Bench) -> None:
        self.need(draws, "bias")
        most = draws.session.launch.options.max_logit_bias
        worst = [int(np.argmin(draws.logits[row])) for row in range(4)]
        many = {token: 30 - token / 100 for token in range(0, VOCAB, VOCAB // most + 1)}
        biases: list[dict[int, float]] = [
            {worst[0]: 100.0},
            {int(np.argmax(draws.logits[1])): -100.0},
            {0: 50.5, VOCAB - 1: 51.5},
            dict([*many.items()][:most]),
        ]
        drawings = [
            Drawing(row=row, bias=bias, of_drawn=self.scored(draws))
            for row, bias in enumerate(biases)
        ]
        draws.expect(drawings, draws.draw(drawings))

    def test_a_bitmask_lets_only_its_tokens_through(self, draws: Bench) -> None:
        self.need(draws, "bitmask")
        sets = (
            frozenset({0}),
            frozenset({VOCAB - 1}),
            frozenset(range(31, VOCAB, 32)),
            frozenset(range(0, VOCAB, 3)) | {VOCAB - 2},
        )
        drawings = [
            Drawing(row=row, allowed=ids, of_drawn=self.scored(draws))
            for row, ids in enumerate(sets)
        ]
        draws.expect(drawings, draws.draw(drawings))
        if "sampled" in draws.session.launch.capabilities.features:
            hot = [replace(d, temperature=0.5, seed=index) for index, d in enumerate(drawings)]
            draws.expect(hot, draws.draw(hot))

    def test_a_target_is_scored_in_place_of_a_draw(self, draws: Bench) -> None:
        self.need(draws, "targets")
        drawings = [Drawing(row=row, target=row * 57) for row in range(4)] + [Drawing(row=5)]
        extra = frozenset({"logprobs"}) if self.scored(draws) else frozenset()
        output = draws.draw(drawings, extra)
        assert np.asarray(output.ids)[:4].tolist() == [0, 57, 114, 171]
        draws.expect(drawings, output)

    def test_a_target_is_not_counted(self, draws: Bench) -> None:
        self.need(draws, "targets", "penalties")
        counts = {slot: np.zeros(VOCAB, np.int32) for slot in range(2)}
        for slot in counts:
            draws.reset(slot, counts[slot])
        best = int(np.argmax(draws.logits[2]))
        targets = [Drawing(row=2, slot=slot, target=best) for slot in range(2)]
        draws.draw(targets, frozenset({"penalties"}))
        drawings = [Drawing(row=2, slot=slot, penalties=(9.0, 9.0, 9.0)) for slot in range(2)]
        draws.expect(drawings, draws.draw(drawings), counts)

    def test_logprobs_are_of_the_raw_logits_or_of_the_distribution_drawn_from(
        self, draws: Bench
    ) -> None:
        self.need(draws, "logprobs")
        most = draws.session.launch.options.max_logprobs
        claimed = draws.session.launch.capabilities.features
        base = Drawing(temperature=0.6) if "sampled" in claimed else Drawing()
        drawings = [
            replace(base, row=row, seed=row, of_drawn=of_drawn)
            for row in (0, 1, NUM_ROWS - 1)
            for of_drawn in (False, True)
        ]
        output = draws.draw(drawings, frozenset({"logprobs"}))
        draws.expect(drawings, output)
        for field in (output.top_ids, output.top_logprobs):
            assert np.asarray(field).shape == (len(drawings), most)
        assert np.asarray(output.rank).dtype == np.asarray(output.top_ids).dtype == np.int32
        assert (
            np.asarray(output.logprob).dtype == np.asarray(output.top_logprobs).dtype == np.float32
        )

    def test_a_step_without_logprobs_has_none(self, draws: Bench) -> None:
        features = draws.features(frozenset())
        output = draws.draw([Drawing()])
        fields = (output.logprob, output.rank, output.top_ids, output.top_logprobs)
        assert [field is not None for field in fields] == ["logprobs" in features] * 4

    def test_rows_of_one_step_have_each_their_own_features(self, draws: Bench) -> None:
        everything = self.everything(draws)
        counts = {slot: some_counts(slot) for slot in range(draws.num_slots)}
        drawings = [
            Drawing(),
            Drawing(temperature=1.2, seed=2**33),
            Drawing(temperature=0.9, seed=4, top_k=3, top_p=0.9),
            Drawing(penalties=(1.4, 0.5, 0.5)),
            Drawing(bias={3: 40.0}),
            Drawing(allowed=frozenset({5, 600})),
            Drawing(target=9),
            Drawing(temperature=2.0, seed=8, typical_p=0.6, bias={7: 20.0}, of_drawn=True),
        ]
        served = [drawing for drawing in drawings if drawing.features <= everything]
        for first in range(0, len(served), draws.num_held):
            some = [
                replace(drawing, row=row, slot=row)
                for row, drawing in enumerate(served[first : first + draws.num_held])
            ]
            if "penalties" in everything:
                for slot in range(len(some)):
                    draws.reset(slot, counts[slot])
            draws.expect(some, draws.draw(some, everything), counts)

    @pytest.mark.parametrize("everything", [False, True])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_rows_that_are_not_finite_are_named_and_disturb_no_other(
        self, draws: Bench, value: float, everything: bool
    ) -> None:
        if value == -np.inf and not everything:
            self.thorough()
        logits = draws.logits.copy()
        logits[1, 0] = logits[3, VOCAB - 1] = logits[4, 350] = logits[6, :] = value
        try:
            reader = draws.session.table(torch.from_numpy(logits))
        except RuntimeError as error:  # of torch: what a device that knows no infinity may do
            pytest.skip(f"the device takes no {value}: {error}")
        extra = self.everything(draws) if everything else frozenset[str]()
        drawings = [Drawing(row=row) for row in range(8)]
        output = draws.draw(drawings, extra, reader=reader)
        found = np.asarray(output.finite).astype(bool).tolist()
        assert found == [row not in (1, 3, 4, 6) for row in range(8)]
        wanted = draws.logits.argmax(-1)
        for row in (0, 2, 5, 7):
            drawn = np.asarray(output.ids)[row]
            assert drawn == wanted[row], f"row {row} is finite, and draws {drawn}"
        draws.expect(drawings, draws.draw(drawings, extra))

    def test_extreme_logits_are_finite_and_drawn_from(self, draws: Bench) -> None:
        logits = np.zeros((4, VOCAB), np.float32)
        logits[0, 9], logits[0, 10] = 1e30, -1e30
        logits[1], logits[1, 11] = -1e30, -1e29
        logits[2], logits[2, 12] = 1e30, 1.1e30
        logits[3] = 7.0
        extreme = replace(
            draws, logits=logits, reader=draws.session.table(torch.from_numpy(logits))
        )
        drawings = [Drawing(row=row, of_drawn=self.scored(draws)) for row in range(3)]
        extreme.expect(drawings, extreme.draw(drawings, self.everything(draws)))
        if "sampled" in draws.session.launch.capabilities.features:
            hot = [Drawing(row=row, temperature=0.2, seed=row) for row in range(4)]
            extreme.expect(hot, extreme.draw(hot, self.everything(draws)))

    def test_prefill_rows_draw_as_decoding_rows_do(self, draws: Bench) -> None:
        features = draws.features(frozenset())
        wanted = draws.logits.argmax(-1)
        row = Row(token_ids=(1, 2, 3), blocks=((1,),))
        for logits in ("last", "all"):
            if not draws.session.can_hold([row], logits):
                continue
            some = (3,) if logits == "last" else row.token_ids
            # a request keeps what is drawn last
            drawings = [Drawing(row=token, slot=0, for_sink=token != 3) for token in some]
            arrays = draws.arrays(drawings, features)
            batch = draws.session.batch([row], logits=logits, features=features, sampling=arrays)
            output = draws.session.draw(draws.reader, batch)
            assert np.asarray(output.ids).tolist() == [wanted[d.row] for d in drawings]

    def everything(self, draws: Bench) -> frozenset[str]:
        """The largest variant, less what the contract gives no definition of."""
        return draws.session.launch.capabilities.features - {"watermark"}

    def scored(self, draws: Bench) -> bool:
        """Whether distributions can be looked at through logprobs."""
        return "logprobs" in draws.session.launch.capabilities.features


def some_counts(slot: int) -> I32:
    """[V]: some ids in the prompt, some drawn, some both."""
    generator = np.random.default_rng(slot)
    drawn = generator.integers(0, 4, VOCAB) * (generator.random(VOCAB) < 0.3)
    in_prompt = generator.random(VOCAB) < 0.2
    return (drawn + IN_PROMPT * in_prompt).astype(np.int32)
