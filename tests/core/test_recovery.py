"""Steps that raise: the request at fault ends, and no other notices."""

from __future__ import annotations

import pytest
from fakes import continuation, null_engine, submit
from hypothesis import given, settings
from hypothesis import strategies as st

from chipset.backends.capabilities import Capabilities
from chipset.backends.shapes import BatchPolicy
from chipset.backends.step import StepBatch
from chipset.core.engine import Engine
from chipset.core.messages import Tokens

POISON = 999
POLICIES = [
    BatchPolicy(max_rows=16, max_tokens=64),
    BatchPolicy(max_rows=16, max_tokens=24),
    BatchPolicy(max_rows=16, max_tokens=64, mixed=False, max_prefills=1),
    BatchPolicy(max_rows=16, max_tokens=64, mixed=False, token_layout="rows"),
]
WHOLE = Capabilities(device_type="cpu")
"""Neither chunked prefill nor prefix cache nor preemption."""


def poisoned(batch: StepBatch) -> Exception | None:
    return IndexError("row 3 is out of range") if POISON in batch.token_ids else None


def serve(engine: Engine, prompts: dict[int, list[int]], new: int = 8) -> dict[int, list[Tokens]]:
    for number, prompt in prompts.items():
        engine.submit(submit(number, prompt, new))
    outputs: dict[int, list[Tokens]] = {number: [] for number in prompts}
    for _ in range(3000):
        if engine.is_idle:
            return outputs
        for tokens in engine.step():
            outputs[tokens.request_id].append(tokens)
        engine.check()
    raise AssertionError("the engine does not come to an end")


def text(outputs: list[Tokens]) -> list[int]:
    return [token.id for output in outputs for token in output.tokens]


def prompts_with_poison(at: int, count: int = 16) -> dict[int, list[int]]:
    prompts = {n: list(range(20 * n, 20 * n + 5 + n % 4)) for n in range(count)}
    prompts[at].append(POISON)
    return prompts


@pytest.mark.parametrize("loses_cache", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("at", [0, 7, 15])
def test_one_of_sixteen_is_at_fault_and_fifteen_finish_as_if_alone(policy, at, loses_cache):
    engine = null_engine(
        num_blocks=200, num_slots=16, policy=policy, fault=poisoned, loses_cache=loses_cache
    )
    prompts = prompts_with_poison(at)
    outputs = serve(engine, prompts)
    for number, prompt in prompts.items():
        if number == at:
            (end,) = outputs[at]
            assert end.finish_reason == "error"
            assert "IndexError" in end.error
            assert not end.tokens
        else:
            assert text(outputs[number]) == continuation(prompt, 8)
            assert outputs[number][-1].finish_reason == "length"
    assert engine.scheduler.kv.num_held == 0
    assert not engine.scheduler.suspects
    assert engine.stats().errors == 1
    assert engine.stats().failed_steps >= 1


def test_the_one_at_fault_is_found_by_halving():
    engine = null_engine(
        num_blocks=200,
        num_slots=16,
        policy=BatchPolicy(max_rows=16, max_tokens=512),
        fault=poisoned,
    )
    serve(engine, prompts_with_poison(11))
    assert engine.stats().failed_steps == 5  # 16, 8, 4, 2, 1


def test_a_request_that_fails_while_it_decodes_is_found_among_the_others():
    prompts = {n: list(range(20 * n, 20 * n + 6)) for n in range(16)}
    third = continuation(prompts[5], 3)[2]

    def fault(batch: StepBatch) -> Exception | None:
        return RuntimeError("bad id") if third in batch.token_ids else None

    engine = null_engine(num_blocks=200, num_slots=16, fault=fault)
    outputs = serve(engine, prompts)
    failed = [n for n, out in outputs.items() if out[-1].finish_reason == "error"]
    assert failed == [5]
    assert text(outputs[5]) == continuation(prompts[5], 3)
    assert all(text(outputs[n]) == continuation(prompts[n], 8) for n in prompts if n != 5)


def test_a_step_that_fails_once_fails_nobody():
    failures = iter([RuntimeError("a hiccup")])
    engine = null_engine(num_slots=8, fault=lambda batch: next(failures, None))
    prompts = {n: list(range(20 * n, 20 * n + 6)) for n in range(8)}
    outputs = serve(engine, prompts)
    assert all(text(outputs[n]) == continuation(prompts[n], 8) for n in prompts)
    assert engine.stats().errors == 0


def test_a_fault_of_every_request_ends_every_request_and_the_engine_goes_on():
    is_broken = True
    engine = null_engine(
        num_slots=8, fault=lambda batch: RuntimeError("broken") if is_broken else None
    )
    prompts = {n: list(range(20 * n, 20 * n + 6)) for n in range(8)}
    outputs = serve(engine, prompts)
    assert all(out[-1].finish_reason == "error" for out in outputs.values())
    is_broken = False
    assert text(serve(engine, {50: [1, 2, 3]})[50]) == continuation([1, 2, 3], 8)


def test_memory_that_runs_out_makes_steps_smaller_until_they_fit():
    def fault(batch: StepBatch) -> Exception | None:
        return MemoryError() if batch.num_tokens > 10 else None

    engine = null_engine(num_blocks=200, num_slots=16, fault=fault, meaning="out_of_memory")
    prompts = {n: list(range(20 * n, 20 * n + 9)) for n in range(16)}
    outputs = serve(engine, prompts)
    assert all(text(outputs[n]) == continuation(prompts[n], 8) for n in prompts)
    assert engine.stats().errors == 0
    assert engine.stats().failed_steps <= 4


def test_a_step_may_grow_again_after_memory_ran_out():
    engine = null_engine(num_slots=8, meaning="out_of_memory", fault=lambda batch: None)
    engine.submit(submit(1, range(30), 200))
    step = engine.scheduler.schedule()
    engine.scheduler.shrink(step)
    assert engine.scheduler.policy.max_tokens < engine.scheduler.shapes.batch.max_tokens
    for _ in range(600):
        engine.step()
    assert engine.scheduler.policy == engine.scheduler.shapes.batch


@pytest.mark.parametrize("meaning", ["device_lost", "unknown"])
def test_what_the_backend_cannot_explain_is_raised(meaning):
    engine = null_engine(fault=lambda batch: RuntimeError("gone"), meaning=meaning)
    engine.submit(submit(1, range(5), 3))
    with pytest.raises(RuntimeError, match="gone"):
        engine.step()


def test_a_lost_cache_is_forgotten_and_recomputed():
    failures = iter([None] * 4 + [RuntimeError("died with the cache")])
    engine = null_engine(
        num_slots=4, fault=lambda batch: next(failures, None), loses_cache=True, num_blocks=100
    )
    prompts = {n: list(range(20 * n, 20 * n + 9)) for n in range(4)}
    outputs = serve(engine, prompts)
    assert all(text(outputs[n]) == continuation(prompts[n], 8) for n in prompts)
    assert engine.runner.num_caches == 2
    again = serve(engine, {9: prompts[0]}, new=2)[9]
    assert text(again) == continuation(prompts[0], 2)


def test_a_text_that_outgrew_a_step_ends_when_the_cache_is_lost_and_prefill_is_never_cut():
    failures = iter([None] * 8 + [RuntimeError("died with the cache")])
    engine = null_engine(
        capabilities=WHOLE,
        policy=BatchPolicy(max_rows=4, max_tokens=16, mixed=False),
        num_slots=4,
        fault=lambda batch: next(failures, None),
        loses_cache=True,
    )
    long, short = list(range(14)), [500, 501]
    outputs = serve(engine, {1: long, 2: short}, new=12)
    assert outputs[1][-1].finish_reason == "error"
    assert text(outputs[2]) == continuation(short, 12)


def test_a_suspect_whose_client_leaves_holds_nobody_up():
    engine = null_engine(num_blocks=200, num_slots=16, fault=poisoned)
    prompts = prompts_with_poison(3)
    for number, prompt in prompts.items():
        engine.submit(submit(number, prompt, 8))
    while not engine.scheduler.suspects:
        engine.step()
    engine.cancel(range(8))
    outputs: list[int] = []
    for _ in range(500):
        outputs += [t.request_id for t in engine.step() if t.finish_reason]
    assert sorted(outputs) == list(range(8, 16))
    assert engine.is_idle


@settings(max_examples=150, deadline=None)
@given(
    bad=st.sets(st.integers(0, 11), max_size=4),
    policy=st.sampled_from(POLICIES),
    whole=st.booleans(),
    loses_cache=st.booleans(),
    num_blocks=st.integers(30, 120),
    hiccups=st.sets(st.integers(0, 60), max_size=6),
)
def test_whoever_is_at_fault_the_others_get_their_text(
    bad, policy, whole, loses_cache, num_blocks, hiccups
):
    steps = 0

    def fault(batch: StepBatch) -> Exception | None:
        nonlocal steps
        steps += 1
        return ValueError("bad") if steps in hiccups else poisoned(batch)

    engine = null_engine(
        num_blocks=num_blocks,
        num_slots=8,
        policy=policy,
        fault=fault,
        loses_cache=loses_cache,
        **({"capabilities": WHOLE} if whole and policy.max_tokens == 64 else {}),
    )
    prompts = {n: list(range(20 * n, 20 * n + 5 + n % 7)) for n in range(12)}
    for number in bad:
        prompts[number].insert(3, POISON)
    outputs = serve(engine, prompts)
    for number, prompt in prompts.items():
        if number in bad:
            assert outputs[number][-1].finish_reason == "error"
        elif outputs[number][-1].finish_reason != "error":
            assert text(outputs[number]) == continuation(prompt, 8)
    # a hiccup while a suspect stood alone looks just like a fault of its own
    failed = {n for n, out in outputs.items() if out[-1].finish_reason == "error"}
    assert len(failed - bad) <= len(hiccups)
    assert engine.scheduler.kv.num_held == 0
