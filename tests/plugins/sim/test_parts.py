"""The runtime, the cache and attention of the simulators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from chipset.backends.attention import AttentionParams
from chipset.backends.conformance.rows import Row
from chipset.backends.conformance.session import Session
from chipset.backends.errors import UnexpectedCompile
from chipset.backends.kv_cache import KVPlan
from chipset.backends.options import KVGroup
from chipset.backends.reference.attention import ReferenceAttention, attention_arrays
from chipset.backends.step import StepOutput
from chipset.plugins.sim import device, watch
from chipset.plugins.sim.packed import PackedAttention, packed_arrays
from chipset.plugins.sim.rules import RuleBroken
from chipset.plugins.sim.tiles import tile_shape, tiled_arrays

from .sims import decode, make_session, prompt, table


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_the_cache_starts_full_of_nan_the_null_block_too(session: Session) -> None:
    blob = session.export(0, range(8))
    assert torch.isnan(blob.keys).all()
    assert torch.isnan(blob.values).all()


def test_a_step_uploads_once_per_dtype_and_reads_nothing_until_the_result(
    session: Session,
) -> None:
    reader = table(session)
    features = session.launch.capabilities.features
    for chosen in (frozenset[str](), features):
        before = watch.counts()
        pending = session.start(reader, session.batch([decode()], features=chosen))
        started = watch.counts() - before
        assert set(started.uploads_by_dtype) <= {"int32", "float32"}
        assert set(started.uploads_by_dtype.values()) == {1}
        assert started.reads == 0
        assert not started.refused
        found = pending.result()
        arrays = [found.ids, found.finite, found.logprob, found.rank, found.top_logprobs]
        reads = (watch.counts() - before).reads
        assert reads == len({array.dtype for array in arrays if array is not None})
        assert watch.counts().synchronizes == before.synchronizes


def test_the_id_that_a_slot_drew_last_is_fed_where_token_slot_asks_for_it() -> None:
    session = make_session("sim-tpu")
    reader = table(session)
    keep = {"slot": np.array([2], np.int32)}
    first = session.batch([prompt(slot=2)], sampling=keep)
    drawn = int(session.draw(reader, first).ids[0])
    row = decode(slot=2)
    wanted = session.draw(reader, session.batch([replace(row, token_ids=(drawn,))])).ids[0]
    batch = session.batch([replace(row, token_ids=((drawn + 1) % 128,))])
    assert batch.token_slot is not None
    batch.token_slot[0] = 2
    assert session.draw(reader, batch).ids[0] == wanted


def test_an_export_reads_once_and_only_for_its_result(session: Session) -> None:
    before = watch.counts()
    pending = session.backend.kv.export_blocks(session.cache, 0, np.array([1, 2], np.int32))
    assert (watch.counts() - before).reads == 0
    pending.result()
    assert (watch.counts() - before).reads == 1


def test_a_fetch_keeps_every_field_apart() -> None:
    session = make_session("sim-gpu")
    put = session.backend.runtime.put
    ids, ranks = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([5, 6], dtype=torch.int32)
    output = StepOutput(
        ids=put(ids),
        finite=put(torch.tensor([True, False])),
        rank=put(ranks),
        top_logprobs=put(torch.tensor([[0.5, 1.5], [2.5, 3.5]])),
    )
    found = session.backend.runtime.fetch(output).result()
    assert found.ids.tolist() == [1, 2]
    assert found.finite.tolist() == [True, False]
    assert found.rank.tolist() == [5, 6]
    assert found.top_logprobs.tolist() == [[0.5, 1.5], [2.5, 3.5]]
    assert found.logprob is None


def test_errors_are_told_apart() -> None:
    classify = make_session("sim-tpu").backend.runtime.classify
    with pytest.raises(torch.AcceleratorError) as refused:
        torch.zeros(1, device="sim").item()
    with pytest.raises(torch.OutOfMemoryError) as full:
        torch.zeros(1 << 40, device="sim")
    assert classify(refused.value) == "unknown"
    assert classify(full.value) == "out_of_memory"
    assert classify(RuleBroken("mixing", "x")) == "unknown"
    assert classify(UnexpectedCompile("x")) == "unknown"
    assert classify(ValueError("x")) == "request"


def test_int64_and_infinities_are_refused_by_the_devices_that_do_not_know_them() -> None:
    make_session("sim-tpu")
    with pytest.raises(torch.AcceleratorError, match="int64"):
        torch.zeros(2, dtype=torch.int64, device="sim")
    with pytest.raises(torch.AcceleratorError, match="inf"):
        torch.zeros(2, device="sim").masked_fill(torch.ones(2, device="sim") > 0, float("-inf"))
    make_session("sim-gaudi")
    with pytest.raises(torch.AcceleratorError, match="int64"):
        torch.zeros(2, dtype=torch.int64, device="sim")
    make_session("sim-gpu")
    torch.zeros(2, dtype=torch.int64, device="sim")


def test_a_profiled_budget_is_what_the_largest_step_leaves() -> None:
    session = make_session("sim-gpu")
    kv = session.backend.kv
    wanted = kv.budget(0.9, lambda: None)
    used = device.memory_allocated()
    step, graphs, slots = 1 << 20, (4 * used + (4 << 20)) // 10, 5 * 129 * 4
    device.set_total_memory(4 * used + (4 << 20))
    try:
        total = device.mem_get_info()[1]
        share = (used + step + graphs + slots + 1000) / total

        def hungry() -> None:
            torch.zeros(step // 4, device="sim")

        left = kv.budget(share, hungry)
        assert 0 < left < wanted
        assert abs(left - 1000) < 10
        assert kv.budget(0.01, lambda: None) == 0
    finally:
        device.set_total_memory()


def test_a_predicted_budget_holds_a_few_texts() -> None:
    session = make_session("sim-neuron")
    group: KVGroup = session.launch.model.groups[0]
    kv = session.backend.kv
    assert kv.budget(0.9, None) == (1 + 4 * 2) * kv.block_bytes(group)
    kv.allocate([KVPlan(group=group, num_blocks=9)])


def random_tensors(session: Session, num_tokens: int) -> tuple[torch.Tensor, ...]:
    spec = session.launch.model.attention[0]
    generator = torch.Generator().manual_seed(2)
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    return tuple(
        session.backend.runtime.put(torch.randn(num_tokens, n, 64, generator=generator))
        for n in heads
    )


def test_a_row_of_nan_reaches_no_other_row_of_a_packed_decode() -> None:
    session = make_session("sim-gaudi")
    spec = session.launch.model.attention[0]
    session.fill(0.5)
    rows = [decode(block=1), decode(block=2, slot=1)]
    batch = session.batch(rows)
    arrays = packed_arrays(batch, session.block_size)
    inputs = {n: session.backend.runtime.put(torch.from_numpy(a)) for n, a in arrays.items()}
    q, k, v = random_tensors(session, batch.bucket.num_tokens)
    q[0] = float("nan")
    out, _ = PackedAttention().attend(0, spec, q, k, v, session.cache, inputs, AttentionParams())
    with watch.reading():
        found = out.cpu()
    assert torch.isnan(found[0]).all()
    assert torch.isfinite(found[1]).all()


@pytest.mark.parametrize("lengths", [(1, 1, 1), (33, 1, 1), (1, 40, 7), (64,)])
def test_tiles_attend_as_whole_rows_do(lengths: tuple[int, ...]) -> None:
    session = make_session("sim-gpu", max_context=64)
    spec = session.launch.model.attention[0]
    session.fill(0.25)
    free = iter(range(1, 9))
    rows = [
        Row(
            token_ids=tuple(range(length)),
            blocks=(tuple(next(free) for _ in range(-(-length // session.block_size))),),
            slot=slot,
        )
        for slot, length in enumerate(lengths)
    ]
    batch = session.batch(rows)
    q, k, v = random_tensors(session, batch.bucket.num_tokens)
    outs = []
    for arranged in (tiled_arrays, attention_arrays):
        arrays = arranged(batch, session.block_size)
        inputs = {n: session.backend.runtime.put(torch.from_numpy(a)) for n, a in arrays.items()}
        out, _ = ReferenceAttention().attend(
            0, spec, q, k, v, session.cache, inputs, AttentionParams()
        )
        with watch.reading():
            outs.append(out.cpu()[: batch.num_tokens])
    assert torch.allclose(*outs, atol=1e-6)


def test_the_number_of_tiles_depends_on_the_bucket_alone() -> None:
    session = make_session("sim-tpu")
    one = session.batch([prompt(20)])
    two = session.batch([decode(), prompt(10, block=2, slot=1), prompt(9, block=3, slot=2)])
    assert one.bucket == two.bucket
    shapes = [
        {name: array.shape for name, array in tiled_arrays(batch, 32).items()}
        for batch in (one, two)
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0]["gather"] == tile_shape(one.bucket)
