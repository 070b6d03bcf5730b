"""The engine on a device that remembers what was written where."""

import pytest
from fakes import continuation, null_engine, submit
from hypothesis import given, settings
from hypothesis import strategies as st

from chipset.backends.options import SamplingParams
from chipset.backends.shapes import BatchPolicy
from chipset.core.engine import Engine
from chipset.core.errors import InvalidRequest
from chipset.core.messages import Tokens


def run(engine: Engine, limit: int = 2000) -> dict[int, list[Tokens]]:
    """Step until idle; what was drawn, by request."""
    outputs: dict[int, list[Tokens]] = {}
    for _ in range(limit):
        if engine.is_idle:
            return outputs
        for tokens in engine.step():
            outputs.setdefault(tokens.request_id, []).append(tokens)
        engine.check()
    raise AssertionError("the engine does not come to an end")


def text(outputs: list[Tokens]) -> list[int]:
    return [token.id for output in outputs for token in output.tokens]


def test_a_request_gets_the_tokens_it_would_get_alone():
    engine = null_engine()
    engine.submit(submit(1, range(10), 7))
    outputs = run(engine)[1]
    assert text(outputs) == continuation(range(10), 7)
    assert [o.finish_reason for o in outputs] == [None] * 6 + ["length"]


def test_a_long_prompt_is_computed_in_chunks_beside_decoding_rows():
    engine = null_engine()
    engine.submit(submit(1, range(5), 10))
    engine.step()
    engine.submit(submit(2, range(100, 150), 3))
    outputs = run(engine)
    assert text(outputs[2]) == continuation(range(100, 150), 3)
    mixed = [b for b in engine.runner.steps if 0 < b.num_decode_rows < b.num_rows]
    assert mixed
    assert max(b.num_tokens for b in engine.runner.steps) == 16


def test_a_stop_id_ends_the_text_and_is_its_last_token():
    expected = continuation(range(10), 9)
    engine = null_engine()
    engine.submit(submit(1, range(10), 50, stop_ids=[expected[4]]))
    outputs = run(engine)[1]
    assert text(outputs) == expected[:5]
    assert outputs[-1].finish_reason == "stop"


def test_ignored_stop_ids_do_not_end_the_text():
    expected = continuation(range(10), 9)
    engine = null_engine()
    engine.submit(submit(1, range(10), 9, stop_ids=[expected[4]], ignore_eos=True))
    assert text(run(engine)[1]) == expected


def test_a_stop_id_below_the_minimum_is_biased_away():
    engine = null_engine()
    engine.submit(submit(1, range(10), 5, stop_ids=[3, 4], min_new_tokens=2))
    run(engine)
    biases = [b.sampling.bias_ids for b in engine.runner.steps]
    assert [b is not None for b in biases] == [True, True, False, False, False]
    assert sorted(biases[0][0, :2].tolist()) == [3, 4]
    assert engine.runner.steps[0].sampling.bias_values[0, 0] < -1e29


def test_a_second_request_starts_from_the_prompt_and_the_output_of_the_first():
    engine = null_engine()
    engine.submit(submit(1, range(12), 9))
    first = text(run(engine)[1])
    engine.submit(submit(2, [*range(12), *first, 7], 3))
    outputs = run(engine)[2]
    assert outputs[0].cached_tokens == 20  # the last drawn token was never computed
    assert text(outputs) == continuation([*range(12), *first, 7], 3)


def test_a_salt_keeps_texts_apart():
    engine = null_engine()
    engine.submit(submit(1, range(12), 2, cache_salt="a"))
    run(engine)
    engine.submit(submit(2, range(12), 2, cache_salt="b"))
    assert run(engine)[2][0].cached_tokens == 0


def test_cancelling_frees_everything_at_once():
    engine = null_engine()
    for number in range(6):
        engine.submit(submit(number, range(number, number + 30), 20))
    engine.step()
    engine.step()
    engine.cancel(range(6))
    assert engine.is_idle
    assert engine.scheduler.kv.num_held == 0
    engine.check()
    assert engine.stats().cancelled == 6


def test_preemption_does_not_change_the_text():
    engine = null_engine(num_blocks=14, prefix_cache=False)
    prompts = {n: list(range(10 * n, 10 * n + 9)) for n in range(5)}
    for number, prompt in prompts.items():
        engine.submit(submit(number, prompt, 20))
    outputs = run(engine)
    assert engine.stats().preemptions > 0
    for number, prompt in prompts.items():
        assert text(outputs[number]) == continuation(prompt, 20)


def test_a_row_that_is_not_finite_ends_alone_and_its_blocks_are_not_found_again():
    engine = null_engine(poison=frozenset({999}))
    engine.submit(submit(1, range(10), 5))
    engine.submit(submit(2, [*range(20, 30), 999], 5))
    outputs = run(engine)
    assert text(outputs[1]) == continuation(range(10), 5)
    assert outputs[2][-1].finish_reason == "error"
    assert "not finite" in outputs[2][-1].error
    assert engine.scheduler.kv.num_held == 0
    engine.submit(submit(3, [*range(20, 30), 5], 1))
    assert run(engine)[3][0].cached_tokens == 0


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (submit(1, [], 4), "no tokens"),
        (submit(1, [1000], 4), "vocabulary"),
        (submit(1, [-1], 4), "vocabulary"),
        (submit(1, range(256), 4), "room"),
        (submit(1, range(200), 57), "ask for fewer"),
        (submit(1, range(10), 0), "at least 1"),
        (submit(1, [1], 4, sampling=SamplingParams(watermark=True)), "watermark"),
        (submit(1, [1], 4, sampling=SamplingParams(num_logprobs=6)), "logprobs"),
        (submit(1, [1], 4, sampling=SamplingParams(logit_bias={5000: 1.0})), "vocabulary"),
        (submit(1, [1], 4, sampling=SamplingParams(logit_bias=dict.fromkeys(range(9), 1.0))), "8"),
        (submit(1, [1], 4, stop_ids=list(range(9)), min_new_tokens=1), "biases"),
    ],
)
def test_a_request_that_can_never_run_is_refused_by_reason(bad, word):
    engine = null_engine()
    with pytest.raises(InvalidRequest, match=word):
        engine.submit(bad)
    assert engine.is_idle


def test_a_prompt_that_outgrows_the_whole_cache_is_refused_at_once():
    engine = null_engine(num_blocks=8)
    with pytest.raises(InvalidRequest, match="KV cache"):
        engine.submit(submit(1, range(20), 10))


def test_penalty_counts_are_rebuilt_after_preemption():
    engine = null_engine(preempt_every=3)
    sampling = SamplingParams(repetition_penalty=1.2)
    engine.submit(submit(1, [5, 5, 6], 6, sampling=sampling))
    outputs = text(run(engine)[1])
    counts = [c for _, c in engine.runner.resets if c is not None]
    assert len(counts) > 1
    assert counts[0][5] == 2**30
    drawn = outputs[: int((counts[1] & (2**30 - 1)).sum())]
    assert drawn
    assert all(counts[1][token] & (2**30 - 1) for token in drawn)


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 3),  # which shared prefix
        st.integers(0, 30),  # how much of it
        st.integers(1, 20),  # tokens of its own
        st.integers(1, 15),  # new ones
        st.integers(0, 12),  # steps before it comes
        st.one_of(st.none(), st.integers(0, 20)),  # steps until its client leaves
    ),
    min_size=1,
    max_size=10,
)
POLICIES = st.sampled_from(
    [
        BatchPolicy(max_rows=8, max_tokens=16),
        BatchPolicy(max_rows=3, max_tokens=7),
        BatchPolicy(max_rows=8, max_tokens=64, mixed=False, max_prefills=1),
        BatchPolicy(max_rows=4, max_tokens=32, mixed=False, token_layout="rows"),
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    requests=REQUESTS,
    policy=POLICIES,
    windows=st.sampled_from([(None,), (None, 6), (9,), (5, None)]),
    num_blocks=st.integers(24, 60),
    preempt_every=st.sampled_from([0, 0, 2, 5]),
)
def test_random_traffic_changes_no_text(requests, policy, windows, num_blocks, preempt_every):
    engine = null_engine(
        num_blocks=num_blocks, windows=windows, policy=policy, preempt_every=preempt_every
    )
    prompts = {
        n: [*range(100 * kind, 100 * kind + shared), *range(500 + 20 * n, 500 + 20 * n + own)]
        for n, (kind, shared, own, *_) in enumerate(requests)
    }
    drawn: dict[int, list[int]] = {n: [] for n in prompts}
    gone = set()
    for step in range(1500):
        for n, (_, _, _, new, arrival, leaves) in enumerate(requests):
            if step == arrival:
                engine.submit(submit(n, prompts[n], new))
            if leaves is not None and step == arrival + leaves:
                engine.cancel([n])
                gone.add(n)
        if engine.is_idle and step > 40:
            break
        for output in engine.step():
            drawn[output.request_id] += [token.id for token in output.tokens]
        engine.check()
    assert engine.is_idle
    assert engine.scheduler.kv.num_held == 0
    for n, (_, _, _, new, _, _) in enumerate(requests):
        window = windows[0] if windows == (9,) else None
        expected = continuation(prompts[n], new, window)
        assert drawn[n] == (expected[: len(drawn[n])] if n in gone else expected)
