"""What is derived from a StepBatch, against the plainest loops."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from chipset.backends.options import SamplingParams
from chipset.backends.shapes import Bucket, Phase
from chipset.backends.step import (
    SamplingBatch,
    StepBatch,
    StepInputs,
    StepOutput,
    row_first,
    slot_mapping,
    token_index,
    token_row,
)

BLOCK = 4


def make_batch(rows, layout, padding):
    """rows: (tokens before the step, tokens of the step) each."""
    query = max(n for _, n in rows)
    num_rows = len(rows) + padding
    num_tokens = num_rows * query if layout == "rows" else sum(n for _, n in rows) + padding
    width = max(-(-(c + n) // BLOCK) for c, n in rows)
    zeros = lambda *shape: np.zeros(shape, np.int32)  # noqa: E731
    table = np.arange(1, num_rows * width + 1, dtype=np.int32).reshape(num_rows, width)
    pad = [0] * padding
    return StepBatch(
        bucket=Bucket(
            phase=Phase.PREFILL,
            num_rows=num_rows,
            num_tokens=num_tokens,
            num_logits=1,
            max_query=query,
            blocks_per_row=width,
        ),
        num_rows=len(rows),
        num_decode_rows=0,
        num_tokens=sum(n for _, n in rows),
        num_logits=0,
        token_ids=zeros(num_tokens),
        positions=zeros(1, num_tokens),
        query_len=np.array([n for _, n in rows] + pad, np.int32),
        context_len=np.array([c + n for c, n in rows] + pad, np.int32),
        row_slot=zeros(num_rows),
        block_table=[table],
        logit_index=zeros(1),
        sampling=SamplingBatch(features=frozenset(), slot=zeros(1), position=zeros(1)),
    )


@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=5),
    layout=st.sampled_from(["packed", "rows"]),
    padding=st.integers(0, 3),
)
def test_rows_indices_and_slots_are_what_loops_would_say(rows, layout, padding):
    batch = make_batch(rows, layout, padding)
    row, index = token_row(batch, layout), token_index(batch, layout)
    slots = slot_mapping(batch, 0, BLOCK, layout)
    at, seen = 0, set()
    for number, (computed, count) in enumerate(rows):
        first = number * batch.bucket.max_query if layout == "rows" else at
        assert row_first(batch, layout)[number] == first
        for offset in range(count):
            token, place = first + offset, computed + offset
            assert row[token] == number
            assert index[token] == place
            block = batch.block_table[0][number, place // BLOCK]
            assert slots[token] == block * BLOCK + place % BLOCK
            seen.add(token)
        at += count
    padding_tokens = set(range(batch.bucket.num_tokens)) - seen
    assert all(row[t] == slots[t] == -1 and index[t] == 0 for t in padding_tokens)
    assert row.dtype == index.dtype == slots.dtype == np.int32


def test_absent_fields_are_structure_and_not_leaves():
    output = StepOutput(ids=torch.zeros(2), finite=torch.ones(2))
    leaves, structure = pytree.tree_flatten(output)
    assert len(leaves) == 2
    assert pytree.tree_unflatten(leaves, structure).logprob is None
    bucket = Bucket(
        phase=Phase.DECODE, num_rows=1, num_tokens=1, num_logits=1, max_query=1, blocks_per_row=1
    )
    inputs = StepInputs(
        bucket=bucket,
        features=frozenset({"sampled"}),
        token_ids=torch.zeros(1),
        positions=torch.zeros(1, 1),
        logit_index=torch.zeros(1),
        token_slot=None,
        attention={"a": torch.zeros(1)},
        sampling={},
    )
    leaves, structure = pytree.tree_flatten(inputs)
    again = pytree.tree_unflatten(leaves, structure)
    assert len(leaves) == 4
    assert again.bucket is bucket
    assert again.features == {"sampled"}


def test_sampling_parameters_name_the_features_they_need():
    assert SamplingParams().features == set()
    assert SamplingParams(top_p=0.5).features == set()  # greedy text has no use for filters
    assert SamplingParams(temperature=1.0).features == {"sampled"}
    assert SamplingParams(temperature=1.0, top_k=5).features == {"sampled", "filters"}
    assert SamplingParams(presence_penalty=0.5).features == {"penalties"}
    assert SamplingParams(logit_bias={1: 2.0}, num_logprobs=0).features == {"bias", "logprobs"}
    assert SamplingParams(watermark=True).features == {"watermark"}
