"""Rows become arrays."""

import numpy as np
from fakes import null_engine, submit

from chipset.backends.options import SamplingParams


def batch_of(*submits):
    engine = null_engine()
    for one in submits:
        engine.submit(one)
    engine.step()
    return engine.runner.steps[-1]


def test_greedy_rows_carry_slot_and_position_and_nothing_else():
    sampling = batch_of(submit(1, [5, 6, 7])).sampling
    assert sampling.features == frozenset()
    assert sampling.position.tolist() == [3]
    present = {n for n in sampling.__slots__ if getattr(sampling, n) is not None}
    assert present == {"features", "slot", "position"}


def test_a_step_that_draws_nothing_still_has_one_row_of_logits():
    batch = batch_of(submit(1, range(40)))
    assert batch.num_logits == 0
    assert batch.logit_index.tolist() == [0]
    assert batch.sampling.slot.tolist() == [8]  # the sink


def test_neutral_values_fill_what_a_row_does_not_ask_for():
    sampling = batch_of(
        submit(1, [1], sampling=SamplingParams()),
        submit(2, [2], sampling=SamplingParams(temperature=0.5, top_k=3, top_p=0.9, seed=7)),
        submit(3, [3], sampling=SamplingParams(repetition_penalty=1.5, frequency_penalty=-1)),
        submit(4, [4], sampling=SamplingParams(logit_bias={8: 2.0, 9: -1.0}, num_logprobs=2)),
    ).sampling
    assert sampling.features == {"sampled", "filters", "penalties", "bias", "logprobs"}
    assert sampling.temperature.tolist() == [0, 0.5, 0, 0]
    assert sampling.top_k.tolist() == [1000, 3, 1000, 1000]
    assert np.allclose(sampling.top_p, [1, 0.9, 1, 1])
    assert sampling.penalties.tolist() == [[1, 0, 0], [1, 0, 0], [1.5, -1, 0], [1, 0, 0]]
    assert sampling.bias_ids[3].tolist() == [8, 9, -1, -1, -1, -1, -1, -1]
    assert sampling.bias_values[3, :2].tolist() == [2, -1]
    assert (sampling.bias_ids[:3] == -1).all()


def test_a_seed_of_64_bits_becomes_two_signed_words():
    seed = 0xFFFF_FFFE_8000_0001
    sampling = batch_of(submit(1, [1], sampling=SamplingParams(temperature=1, seed=seed))).sampling
    assert sampling.seed.tolist() == [[-(2**31) + 1, -2]]


def test_a_request_without_a_seed_gets_one_of_its_own():
    engine = null_engine()
    for number in (1, 2):
        engine.submit(submit(number, [1], sampling=SamplingParams(temperature=1)))
    engine.step()
    seeds = engine.runner.steps[0].sampling.seed
    assert seeds[0].tolist() != seeds[1].tolist()


def test_all_host_arrays_are_contiguous_words():
    batch = batch_of(submit(1, [1, 2], sampling=SamplingParams(temperature=1, top_p=0.5)))
    arrays = [
        getattr(batch, n) for n in batch.__slots__ if isinstance(getattr(batch, n), np.ndarray)
    ]
    arrays += [getattr(batch.sampling, n) for n in batch.sampling.__slots__]
    for array in arrays:
        if isinstance(array, np.ndarray):
            assert array.dtype in (np.int32, np.float32)
            assert array.flags.c_contiguous
