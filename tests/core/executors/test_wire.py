"""What crosses to workers comes out as it went in, and nothing else comes out."""

from dataclasses import fields
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fakes import NullPlugin, null_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from chipset.backends.options import ParallelOptions
from chipset.backends.plugin import WorkerSpec
from chipset.backends.shapes import Bucket, Phase
from chipset.backends.step import SamplingBatch, StepBatch, StepOutput
from chipset.core.executors.wire import (
    Answer,
    Beat,
    Drawn,
    Loaded,
    RunStep,
    WorkerLaunch,
    decode_launch,
    decode_message,
    decode_order,
    encode,
)
from chipset.core.files import ModelFiles
from chipset.core.models.report import WeightReport

SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5)
I32 = arrays.arrays(np.int32, SHAPES)
F32 = arrays.arrays(np.float32, SHAPES)
COUNTS = st.integers(0, 2**31 - 1)


BUCKETS = st.builds(
    Bucket,
    phase=st.sampled_from(Phase),
    **{one.name: COUNTS for one in fields(Bucket) if one.name != "phase"},
)
OF_FLOATS = {"temperature", "top_p", "min_p", "typical_p", "penalties", "bias_values"}
SAMPLING = st.builds(
    SamplingBatch,
    features=st.frozensets(st.sampled_from(["sampled", "filters", "logprobs"])),
    slot=I32,
    position=I32,
    **{
        one.name: st.none() | (F32 if one.name in OF_FLOATS else I32)
        for one in fields(SamplingBatch)
        if one.name not in ("features", "slot", "position")
    },
)
COUNT_FIELDS = ("num_rows", "num_decode_rows", "num_tokens", "num_logits")
ARRAY_FIELDS = (
    "token_ids", "positions", "query_len", "context_len", "row_slot", "logit_index",
)  # fmt: skip
BATCHES = st.builds(
    StepBatch,
    bucket=BUCKETS,
    sampling=SAMPLING,
    block_table=st.lists(I32, max_size=3),
    token_slot=st.none() | I32,
    **dict.fromkeys(COUNT_FIELDS, COUNTS),
    **dict.fromkeys(ARRAY_FIELDS, I32),
)
RESETS = st.lists(st.tuples(st.integers(0, 300), st.none() | I32), max_size=3)
OUTPUTS = st.builds(
    StepOutput,
    ids=I32,
    finite=I32 | arrays.arrays(np.bool_, SHAPES),
    logprob=st.none() | F32,
    rank=st.none() | I32,
    top_ids=st.none() | I32,
    top_logprobs=st.none() | F32,
)


def same(ours: object, theirs: object) -> None:
    """Values and types, arrays by their bits."""
    if isinstance(ours, np.ndarray):
        assert isinstance(theirs, np.ndarray)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()
        assert theirs.flags.writeable
        assert theirs.flags.c_contiguous
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for mine, yours in zip(ours, theirs, strict=True):
            same(mine, yours)
    elif hasattr(ours, "__dataclass_fields__"):
        assert type(ours) is type(theirs)
        for one in fields(ours):
            same(getattr(ours, one.name), getattr(theirs, one.name))
    else:
        assert ours == theirs


@given(BATCHES, RESETS)
def test_a_step_arrives_as_it_was_sent(batch: StepBatch, resets: list) -> None:
    order = decode_order(encode(RunStep(batch, resets)))
    assert isinstance(order, RunStep)
    same(batch, order.batch)
    same(resets, order.resets)


@given(OUTPUTS)
def test_what_was_drawn_arrives_as_it_was_sent(output: StepOutput) -> None:
    message = decode_message(encode(Drawn.of(output)))
    assert isinstance(message, Drawn)
    same(output, message.output())


def test_a_part_of_an_array_arrives_whole() -> None:
    table = np.arange(24, dtype=np.int32).reshape(4, 6)[::2, 1:4]
    [(_, arrived)] = decode_order(encode(RunStep(_empty_batch(), [(0, table)]))).resets
    np.testing.assert_array_equal(arrived, table)


@pytest.mark.parametrize("dtype", ["int64", "float64", "object", ">i4", "S3"])
def test_no_other_dtype_leaves(dtype: str) -> None:
    with pytest.raises(TypeError, match="does not cross"):
        encode(RunStep(_empty_batch(), [(0, np.zeros(2, dtype))]))


@pytest.mark.parametrize(
    "array",
    [
        ("<f4", (2,), b"12345678"),
        ("<i8", (1,), b"12345678"),
        ("|O", (1,), b"12345678"),
        ("<i4", (3,), b"12345678"),
        ("<i4", (-1, -2), b"12345678"),
        ("<i4", (0, 2**62), b""),
        ("<i4", (2,), "12345678"),
        "12345678",
        None,
    ],
)
def test_no_other_array_arrives(array: object) -> None:
    raw = msgspec.msgpack.decode(encode(Drawn.of(_output())))
    with pytest.raises(msgspec.MsgspecError):
        decode_message(msgspec.msgpack.encode({**raw, "ids": array}))


@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    for decode in (decode_order, decode_message, decode_launch):
        try:
            decode(noise)
        except msgspec.MsgspecError:
            continue


@settings(max_examples=300)
@given(st.integers(0, 10_000), st.integers(0, 255), st.integers(0, 10_000))
def test_a_frame_that_was_damaged_or_cut_is_refused_or_another_step(
    at: int, byte: int, end: int
) -> None:
    frame = bytearray(encode(RunStep(_empty_batch(), [(1, np.ones(3, np.int32))])))
    frame[at % len(frame)] = byte
    try:
        order = decode_order(bytes(frame[: len(frame) - end % 7]))
    except msgspec.MsgspecError:
        return
    assert not isinstance(order, RunStep) or order.batch.token_ids.dtype == np.int32


def test_a_launch_arrives_with_the_shapes_that_its_plugin_gives_again() -> None:
    engine = null_engine(windows=(None, 8))
    launch = engine.runner.launch
    here = Path("folder")
    files = ModelFiles(
        source="a", name="b", revision=None, config=here / "config.json",
        tokenizer=here / "t", tokenizer_config=None, chat_template=None, generation_config=None,
        weights=(here / "one", here / "two"),
    )  # fmt: skip
    told = WorkerLaunch.of(launch, files, "int8")
    arrived = decode_launch(encode(told))
    assert arrived == told
    again = arrived.launch(NullPlugin())
    for one in fields(launch):
        if one.name != "shapes":
            assert getattr(again, one.name) == getattr(launch, one.name)
    assert again.shapes.batch.max_rows == launch.options.max_batch_rows
    assert arrived.worker == WorkerSpec(rank=0, local_rank=0, host=0, devices=(0,))
    assert arrived.options.parallel == ParallelOptions()


@pytest.mark.parametrize(
    "message",
    [
        Beat(),
        Answer(),
        Answer(True),
        Answer(2**60),
        Answer([1, 2]),
        Answer({"a": 1.5}),
        Loaded(WeightReport(held_bytes=3, kernels={"int4 by torch": 7})),
    ],
)
def test_every_message_arrives_as_what_it_is(message: object) -> None:
    arrived = decode_message(encode(message))
    assert arrived == message
    assert type(arrived) is type(message)


def _output() -> StepOutput:
    return StepOutput(ids=np.zeros(2, np.int32), finite=np.ones(2, bool))


def _empty_batch() -> StepBatch:
    none = np.zeros(0, np.int32)
    return StepBatch(
        bucket=Bucket(
            phase=Phase.MIXED, num_rows=0, num_tokens=0, num_logits=1, max_query=0, blocks_per_row=0
        ),
        sampling=SamplingBatch(features=frozenset(), slot=none, position=none),
        block_table=[],
        **dict.fromkeys(COUNT_FIELDS, 0),
        **dict.fromkeys(ARRAY_FIELDS, none),
    )
