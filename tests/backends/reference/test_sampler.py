"""Both samplers against Hugging Face's logits processors and against the definition of the noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import generation

from chipset.backends.kv_cache import IN_PROMPT
from chipset.backends.reference.kv_cache import PagedCache
from chipset.backends.reference.sampler import (
    MASKED,
    ReferenceSampler,
    add_bias,
    allowed,
    gumbel,
    heat,
    noise_key,
    penalise,
)
from chipset.backends.shapes import Bucket, Phase
from chipset.backends.step import StepInputs, StepOutput
from chipset.plugins.cpu.sampler import CPUSampler

VOCAB, SLOTS, LOGPROBS = 700, 6, 5
OFF = {"top_k": VOCAB, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


@pytest.fixture(params=[ReferenceSampler, CPUSampler])
def sampler(request: pytest.FixtureRequest) -> ReferenceSampler:
    return request.param(LOGPROBS)


def random_logits(rows: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def empty_cache() -> PagedCache:
    ids = torch.zeros(SLOTS + 1, dtype=torch.int32)
    return PagedCache({}, {}, {}, {}, ids, torch.zeros(SLOTS + 1, VOCAB, dtype=torch.int32))


def i32(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def draw(
    sampler: ReferenceSampler,
    logits: Tensor,
    cache: PagedCache | None = None,
    token_slot: Tensor | None = None,
    **fields: Tensor,
) -> tuple[StepOutput, PagedCache]:
    """Features follow from the fields; filters and seeds that are not named are neutral."""
    rows = len(logits)
    features: set[str] = set()
    sampling = {"slot": i32(*range(rows)), "position": i32(*[3] * rows)} | fields
    if "temperature" in fields:
        features.add("sampled")
        sampling.setdefault("seed", torch.arange(2 * rows, dtype=torch.int32).reshape(rows, 2))
    if features and set(OFF) & set(fields):
        features.add("filters")
        for name, value in OFF.items():
            dtype = torch.int32 if name == "top_k" else torch.float32
            sampling.setdefault(name, torch.full((rows,), value, dtype=dtype))
    names = {"penalties": "penalties", "bias_ids": "bias", "bitmask": "bitmask"}
    names |= {"target": "targets", "of_drawn": "logprobs"}
    features |= {feature for name, feature in names.items() if name in fields}
    bucket = Bucket(
        phase=Phase.DECODE,
        num_rows=rows,
        num_tokens=rows,
        num_logits=rows,
        max_query=1,
        blocks_per_row=1,
    )
    inputs = StepInputs(
        bucket=bucket,
        features=frozenset(features),
        token_ids=i32(*range(rows)),
        positions=i32(*range(rows))[None],
        logit_index=i32(*range(rows)),
        token_slot=token_slot,
        attention=None,
        sampling=sampling,
    )
    return sampler(logits, inputs, empty_cache() if cache is None else cache)


def kept(sampler: ReferenceSampler, logits: Tensor, **fields: Tensor) -> Tensor:
    """[L, V] bool: what filters leave."""
    sampling = {
        name: torch.full((len(logits),), value, dtype=torch.int32 if name == "top_k" else None)
        for name, value in OFF.items()
    }
    return sampler.filter(logits, sampling | fields) > MASKED


def floats(*values: float) -> Tensor:
    return torch.tensor(values)


WARPERS = {
    "top_k": (generation.TopKLogitsWarper, [1, 2, 50, VOCAB - 1]),
    "top_p": (generation.TopPLogitsWarper, [0.01, 0.3, 0.9, 0.999]),
    "min_p": (generation.MinPLogitsWarper, [0.001, 0.05, 0.5, 1.0]),
    "typical_p": (generation.TypicalLogitsWarper, [0.05, 0.4, 0.9, 0.99]),
}


@pytest.mark.parametrize("name", WARPERS)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_each_filter_keeps_what_hugging_face_keeps(
    sampler: ReferenceSampler, name: str, spread: float
) -> None:
    make, values = WARPERS[name]
    logits = random_logits(len(values), spread=spread)
    found = kept(sampler, logits, **{name: torch.tensor(values)})
    for row, value in enumerate(values):
        expected = torch.isfinite(make(value)(None, logits[row : row + 1]))[0]
        assert torch.equal(found[row], expected), value


def test_filters_follow_one_another_and_leave_rows_alone_that_use_none(
    sampler: ReferenceSampler,
) -> None:
    logits = random_logits(3)
    found = kept(
        sampler,
        logits,
        top_k=i32(40, VOCAB, 40),
        top_p=floats(0.8, 1.0, 1.0),
        typical_p=floats(0.7, 1.0, 1.0),
        min_p=floats(0.05, 0.0, 0.0),
    )
    expected = logits[:1]
    for warper in (
        generation.TopKLogitsWarper(40),
        generation.TopPLogitsWarper(0.8),
        generation.TypicalLogitsWarper(0.7),
        generation.MinPLogitsWarper(0.05),
    ):
        expected = warper(None, expected)
    assert torch.equal(found[0], torch.isfinite(expected)[0])
    assert found[1].all()
    assert found[2].sum() == 40


def test_a_nucleus_cuts_equals_at_the_lower_id(sampler: ReferenceSampler) -> None:
    found = kept(sampler, torch.zeros(1, VOCAB), top_p=floats(0.4999))
    assert torch.equal(found[0], torch.arange(VOCAB) < VOCAB // 2)


@pytest.mark.parametrize("p", [0.2, 0.9, 0.999])
def test_a_wide_vocabulary_is_filtered_alike(p: float) -> None:
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(1))
    narrow = logits * 6
    for values in (logits, narrow):
        sampling = {"top_k": i32(5000, 5000), "top_p": floats(p, p)}
        sampling |= {"typical_p": floats(1.0, 1.0), "min_p": floats(0.0, 0.0)}
        one = ReferenceSampler(0).filter(values, sampling) > MASKED
        assert torch.equal(one, CPUSampler(0).filter(values, sampling) > MASKED)


def test_repetition_is_hugging_faces() -> None:
    logits = random_logits(1)
    seen = torch.tensor([[3, 5, 5, 600]])
    held = torch.zeros(1, VOCAB, dtype=torch.int32)
    held[0, 3] = IN_PROMPT
    held[0, 5] = IN_PROMPT + 2
    held[0, 600] = 1
    found = penalise(logits, held, torch.tensor([[1.3, 0.0, 0.0]]))
    expected = generation.RepetitionPenaltyLogitsProcessor(1.3)(seen, logits)
    torch.testing.assert_close(found, expected)


def test_frequency_and_presence_count_the_output_only() -> None:
    held = torch.zeros(1, VOCAB, dtype=torch.int32)
    held[0, 3], held[0, 5] = IN_PROMPT, IN_PROMPT + 2
    found = penalise(torch.zeros(1, VOCAB), held, torch.tensor([[1.0, 0.5, 0.25]]))
    expected = torch.zeros(1, VOCAB)
    expected[0, 5] = -2 * 0.5 - 0.25
    torch.testing.assert_close(found, expected)


def test_bias_adds_up_and_padding_adds_nothing() -> None:
    found = add_bias(torch.zeros(1, 4), i32([0, 2, 2, -1]), torch.tensor([[1.0, 2.0, 3.0, 9.0]]))
    assert found.tolist() == [[1.0, 0.0, 5.0, 0.0]]


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_a_bitmask_allows_exactly_its_bits(bits: list[bool]) -> None:
    packed = np.packbits(bits, bitorder="little")
    words = np.zeros(-(-len(bits) // 32) * 4, np.uint8)
    words[: len(packed)] = packed
    mask = torch.from_numpy(words.view(np.int32).copy())[None]
    assert allowed(mask, len(bits)).tolist() == [bits]


def test_a_masked_logit_stays_finite_at_any_temperature() -> None:
    assert torch.isfinite(heat(torch.tensor([[MASKED, 1.0]]), floats(0.01))).all()


def python_noise(low: int, high: int, position: int, token: int) -> float:
    def mix(word: int) -> int:
        word = ((word ^ word >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
        word = ((word ^ word >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
        return word ^ word >> 16

    key = mix(mix(mix(low & 0xFFFFFFFF) ^ high & 0xFFFFFFFF) ^ position)
    bits = mix(key ^ mix(token + 1)) & 0x7FFFFF
    return -math.log(-math.log((bits + 0.5) / 2**23))


WORD = st.integers(-(2**31), 2**31 - 1)


@given(WORD, WORD, st.integers(0, 2**20), st.integers(0, 300_000))
@settings(max_examples=200)
def test_noise_is_what_the_contract_says(low: int, high: int, position: int, token: int) -> None:
    found = gumbel(noise_key(i32([low, high]), i32(position)), i32(token)).item()
    assert found == pytest.approx(python_noise(low, high, position, token), abs=2e-6, rel=1e-5)


def test_fixed_noise_for_words_of_either_sign() -> None:
    key = noise_key(i32([0, 0], [-1, 2**31 - 1], [-(2**31), 7]), i32(0, 1, 4095))
    found = gumbel(key[:, None], i32(0, 1, 49151))
    expected = [
        [python_noise(0, 0, 0, t) for t in (0, 1, 49151)],
        [python_noise(-1, 2**31 - 1, 1, t) for t in (0, 1, 49151)],
        [python_noise(-(2**31), 7, 4095, t) for t in (0, 1, 49151)],
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-6, rtol=1e-5)


def test_a_seed_gives_the_same_draw_in_any_batch(sampler: ReferenceSampler) -> None:
    logits = random_logits(4)
    fields = {
        "temperature": floats(0.9, 0.0, 1.3, 0.7),
        "seed": i32([1, 2], [0, 0], [-5, 9], [7, -7]),
        "position": i32(5, 6, 7, 8),
        "top_p": floats(0.9, 1.0, 1.0, 0.8),
    }
    together = draw(sampler, logits, **fields)[0].ids
    for row in range(4):
        alone = draw(
            sampler, logits[row : row + 1], **{n: f[row : row + 1] for n, f in fields.items()}
        )
        assert alone[0].ids[0] == together[row]


def test_both_samplers_draw_alike() -> None:
    logits = random_logits(6, spread=1.0)
    fields = {
        "temperature": floats(0.9, 0.0, 1.3, 0.7, 1.0, 5.0),
        "top_k": i32(50, VOCAB, VOCAB, 3, VOCAB, VOCAB),
        "top_p": floats(0.9, 1.0, 1.0, 0.8, 1.0, 0.99),
        "min_p": floats(0.0, 0.0, 0.1, 0.0, 0.0, 0.0),
        "typical_p": floats(1.0, 1.0, 1.0, 1.0, 0.5, 1.0),
        "of_drawn": i32(1, 0, 1, 1, 1, 0),
    }
    for position in range(20):
        fields["position"] = i32(*[position] * 6)
        one, _ = draw(ReferenceSampler(LOGPROBS), logits, **fields)
        other, _ = draw(CPUSampler(LOGPROBS), logits, **fields)
        assert one.ids.tolist() == other.ids.tolist()
        torch.testing.assert_close(one.logprob, other.logprob)


def test_draws_follow_the_distribution(sampler: ReferenceSampler) -> None:
    logits, count = torch.full((1, VOCAB), -30.0), 4000
    logits[0, [3, 50, 51, 400]] = torch.tensor([2.0, 1.0, 0.0, 1.5])
    share = torch.softmax(logits[0] / 0.8, -1)[[3, 50, 51, 400]]
    ids = draw(
        sampler,
        logits.expand(count, -1),
        slot=i32(*[0] * count),
        position=torch.arange(count, dtype=torch.int32),
        temperature=torch.full((count,), 0.8),
        seed=i32([11, 13]).expand(count, 2),
    )[0].ids
    seen = torch.stack([(ids == token).sum() for token in (3, 50, 51, 400)])
    assert int(seen.sum()) == count
    chi_square = ((seen - share * count) ** 2 / (share * count)).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def test_greedy_takes_the_best_and_the_first_of_equals(sampler: ReferenceSampler) -> None:
    logits = random_logits(2)
    logits[0, [7, 9]] = 50.0
    logits[1, 8] = 60.0
    assert draw(sampler, logits)[0].ids.tolist() == [7, 8]


def test_a_greedy_row_is_not_filtered_when_others_are(sampler: ReferenceSampler) -> None:
    logits = torch.log(torch.tensor([[0.2] + [0.8 / (VOCAB - 1)] * (VOCAB - 1)] * 2))
    fields = {"temperature": floats(0.0, 1.0), "typical_p": floats(0.1, 0.1)}
    out, _ = draw(sampler, logits, of_drawn=i32(1, 1), **fields)
    assert out.ids[0] == 0
    assert out.ids[1] != 0


def test_a_bitmask_decides_over_the_best_logit(sampler: ReferenceSampler) -> None:
    logits = random_logits(2)
    logits[:, 3] = 99.0
    words = torch.zeros(2, -(-VOCAB // 32), dtype=torch.int32)
    words[0, 0], words[1, 0] = 0b10000, -(2**31)
    for more in ({}, {"temperature": floats(1.0, 0.3)}):
        assert draw(sampler, logits, bitmask=words, **more)[0].ids.tolist() == [4, 31]


def test_targets_are_scored_instead_of_drawn(sampler: ReferenceSampler) -> None:
    logits = random_logits(2)
    out, _ = draw(sampler, logits, target=i32(17, -1), of_drawn=i32(0, 0))
    assert out.ids.tolist() == [17, int(logits[1].argmax())]
    expected = torch.log_softmax(logits, -1)
    torch.testing.assert_close(out.logprob, expected[[0, 1], out.ids.long()])
    assert out.rank[0] == (logits[0] > logits[0, 17]).sum() + 1


def test_logprobs_of_raw_logits_and_of_those_drawn_from(sampler: ReferenceSampler) -> None:
    logits = random_logits(1).expand(2, -1)
    out, _ = draw(
        sampler,
        logits,
        temperature=floats(0.5, 0.5),
        seed=i32([4, 4], [4, 4]),
        top_k=i32(3, 3),
        of_drawn=i32(0, 1),
    )
    raw = torch.log_softmax(logits[0], -1)
    drawn = torch.log_softmax(logits[0].topk(3).values / 0.5, -1)
    torch.testing.assert_close(out.top_logprobs[0], raw.topk(LOGPROBS).values)
    torch.testing.assert_close(out.top_logprobs[1, :3], drawn)
    assert out.top_ids[0].tolist() == raw.topk(LOGPROBS).indices.tolist()
    assert out.rank.tolist() == [1 + int((raw > raw[out.ids[0]]).sum())] * 2


def test_penalties_see_what_the_sampler_counted(sampler: ReferenceSampler) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :3] = torch.tensor([3.0, 2.9, 2.8])
    cache, ids = empty_cache(), []
    for _ in range(4):
        out, cache = draw(sampler, logits, cache, penalties=torch.tensor([[1.0, 0.0, 1.0]]))
        ids.append(int(out.ids[0]))
    assert ids == [0, 1, 2, 0]
    assert cache.counts[0, :3].tolist() == [2, 1, 1]
    assert cache.counts[1:].sum() == 0


def test_feed_takes_the_last_drawn_id_where_asked(sampler: ReferenceSampler) -> None:
    logits = random_logits(2)
    out, cache = draw(sampler, logits, slot=i32(4, 2))
    inputs = StepInputs(
        bucket=Bucket(
            phase=Phase.DECODE,
            num_rows=3,
            num_tokens=3,
            num_logits=1,
            max_query=1,
            blocks_per_row=1,
        ),
        features=frozenset(),
        token_ids=i32(10, 11, 12),
        positions=i32([0, 0, 0]),
        logit_index=i32(0),
        token_slot=i32(2, -1, 4),
        attention=None,
        sampling={},
    )
    assert sampler.feed(inputs, cache).tolist() == [int(out.ids[1]), 11, int(out.ids[0])]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_a_row_that_is_not_finite_says_so_and_spares_the_others(
    sampler: ReferenceSampler, bad: float, temperature: float | None
) -> None:
    logits = random_logits(3)
    fields = {} if temperature is None else {"temperature": floats(*[temperature] * 3)}
    healthy = draw(sampler, logits, **fields)[0].ids
    logits[1, 5] = bad
    out, _ = draw(sampler, logits, **fields)
    assert out.finite.tolist() == [True, False, True]
    assert out.ids[[0, 2]].tolist() == healthy[[0, 2]].tolist()
    assert 0 <= int(out.ids[1]) < VOCAB


def test_huge_logits_are_finite(sampler: ReferenceSampler) -> None:
    assert draw(sampler, torch.full((1, VOCAB), 3e38))[0].finite.tolist() == [True]


def test_a_functional_sampler_leaves_the_cache_as_it_was() -> None:
    old = empty_cache()
    sampler = ReferenceSampler(LOGPROBS, in_place=False)
    _, new = draw(sampler, random_logits(2), old, penalties=torch.ones(2, 3))
    assert old.counts.sum() == 0
    assert old.last_ids.sum() == 0
    assert new.counts.sum() == 2
