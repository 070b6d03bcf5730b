from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from chipset.backends.reference.attention import attention_arrays
from chipset.backends.reference.compiler import EagerCompiler
from chipset.backends.reference.runtime import HostRuntime
from chipset.backends.reference.staging import stage, unpack
from chipset.backends.shapes import Bucket, Phase
from chipset.backends.step import SamplingBatch, StepBatch, StepInputs, StepOutput


def i32(*values: object) -> np.ndarray:
    return np.array(values, np.int32)


def batch(*, sampled: bool = True, token_slot: np.ndarray | None = None) -> StepBatch:
    bucket = Bucket(
        phase=Phase.MIXED, num_rows=2, num_tokens=4, num_logits=2, max_query=3, blocks_per_row=2
    )
    more = {}
    if sampled:
        more = {"temperature": np.array([0.5, 0.0], np.float32), "seed": i32([1, 2], [3, -4])}
    return StepBatch(
        bucket=bucket,
        num_rows=2,
        num_decode_rows=1,
        num_tokens=4,
        num_logits=2,
        token_ids=i32(5, 6, 7, 8),
        positions=i32([9, 0, 1, 2]),
        query_len=i32(1, 3),
        context_len=i32(10, 3),
        row_slot=i32(0, 1),
        block_table=[i32([3, 4], [1, 0]), i32([0, 2], [5, 0])],
        logit_index=i32(0, 3),
        sampling=SamplingBatch(
            features=frozenset({"sampled"} if sampled else ()),
            slot=i32(0, 1),
            position=i32(10, 3),
            **more,
        ),
        token_slot=token_slot,
    )


class Device:
    def __init__(self) -> None:
        self.put_tensors: list[Tensor] = []

    def put(self, host: Tensor) -> Tensor:
        self.put_tensors.append(host)
        return host


def test_a_step_is_one_copy_a_dtype_and_comes_out_as_it_went_in() -> None:
    device, given = Device(), batch()
    staged = stage(given, attention_arrays(given, 8), device.put)
    assert [t.dtype for t in device.put_tensors] == [torch.int32, torch.float32]
    assert all(t.ndim == 1 for t in device.put_tensors)
    found = unpack(staged)
    assert found.bucket == given.bucket
    assert found.features == {"sampled"}
    assert found.token_slot is None
    assert found.token_ids.tolist() == [5, 6, 7, 8]
    assert found.positions.tolist() == [[9, 0, 1, 2]]
    assert found.logit_index.tolist() == [0, 3]
    assert set(found.sampling) == {"slot", "position", "temperature", "seed"}
    assert found.sampling["seed"].tolist() == [[1, 2], [3, -4]]
    assert found.sampling["temperature"].tolist() == [0.5, 0.0]
    for name, array in attention_arrays(given, 8).items():
        assert np.array_equal(found.attention[name].numpy(), array), name


def test_a_greedy_step_is_one_copy() -> None:
    device, given = Device(), batch(sampled=False, token_slot=i32(0, -1, -1, -1))
    staged = stage(given, attention_arrays(given, 8), device.put)
    assert len(device.put_tensors) == 1
    slot = unpack(staged).token_slot
    assert slot is not None
    assert slot.tolist() == [0, -1, -1, -1]


def test_unpacking_copies_nothing() -> None:
    given = batch()
    staged = stage(given, {}, lambda tensor: tensor)
    staged.integers.fill_(42)
    assert unpack(staged).token_ids.tolist() == [42] * 4


def test_attention_knows_where_queries_lie_and_keys_go() -> None:
    arrays = attention_arrays(batch(), 8)
    assert arrays["gather"].tolist() == [[0, 0, 0], [1, 2, 3]]
    assert arrays["back"].tolist() == [0, 3, 4, 5]
    assert arrays["query_index"].tolist() == [[9, 10, 11], [0, 1, 2]]
    assert arrays["slots0"].tolist() == [33, 8, 9, 10]
    assert arrays["slots1"].tolist() == [17, 40, 41, 42]


class Model(torch.nn.Module):
    def forward(self, inputs: StepInputs, cache: Tensor) -> tuple[Tensor, Tensor]:
        assert torch.is_inference_mode_enabled()
        return inputs.token_ids + cache, cache


def test_the_eager_compiler_unpacks_and_calls() -> None:
    run = EagerCompiler().wrap("model", Model())
    found, _ = run(stage(batch(), {}, lambda tensor: tensor), torch.tensor(1))
    assert found.tolist() == [6, 7, 8, 9]


def test_the_eager_compiler_reports_no_graphs_and_runs_every_bucket() -> None:
    ran, seen = [], []
    runs = [(batch().bucket, frozenset[str]())] * 2
    report = EagerCompiler().warm_up(runs, lambda b, f: ran.append(b), seen.append)
    assert (report.num_graphs, len(ran), seen) == (0, 2, [1, 2])


def test_the_host_fetches_at_once_as_numpy() -> None:
    output = StepOutput(ids=torch.tensor([1, 2]), finite=torch.tensor([True, False]))
    pending = HostRuntime().fetch(output)
    assert pending.done()
    found = pending.result()
    assert isinstance(found.ids, np.ndarray)
    assert found.finite.tolist() == [True, False]
    assert found.logprob is None


def test_the_host_knows_when_memory_ran_out() -> None:
    runtime = HostRuntime()
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**60)
    torch_words = str(told.value)
    assert runtime.classify(RuntimeError(torch_words)) == "out_of_memory"
    assert runtime.classify(MemoryError()) == "out_of_memory"
    assert runtime.classify(RuntimeError("shape mismatch")) == "request"
