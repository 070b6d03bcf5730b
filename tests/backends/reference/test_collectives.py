"""Ranks over gloo: right sums in one order, and a lost rank noticed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_threads import in_ranks, launches
from torch import Tensor

from chipset.backends.plugin import Launch
from chipset.backends.reference.collectives import (
    GlooCollectives,
    PeerLost,
    SingleRank,
    join,
    ordered_sum,
)
from chipset.backends.reference.rendezvous import serve
from chipset.backends.reference.runtime import HostRuntime

T = TypeVar("T")


def talking(work: Callable[[GlooCollectives, int], T], **times: float) -> Callable[[Launch], T]:
    """`work` gets the collectives and the rank."""

    def run(launch: Launch) -> T:
        comm = GlooCollectives(launch, **times)
        try:
            return work(comm, launch.worker.rank)
        finally:
            comm.close()

    return run


def parts(size: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(size)]


@given(st.integers(1, 5), st.integers(0, 9), st.sampled_from([torch.bfloat16, torch.float16]))
def test_narrow_sums_are_rounded_once(size: int, count: int, dtype: torch.dtype) -> None:
    stacked = torch.stack(parts(size, count, dtype=dtype))
    total = torch.zeros(count)
    for part in stacked:
        total = total + part.float()
    assert torch.equal(ordered_sum(stacked), total.to(dtype))


def test_sums_go_in_the_order_of_the_ranks() -> None:
    big = torch.tensor([1e8, 1.0, -1e8])[:, None]
    assert ordered_sum(big).item() == 0  # 1e8 + 1 is 1e8 again
    assert ordered_sum(big[[0, 2, 1]]).item() == 1


def test_a_sum_leaves_its_parts_as_they_were() -> None:
    stacked = torch.ones(3, 2)
    ordered_sum(stacked)
    assert torch.equal(stacked, torch.ones(3, 2))


def test_all_members_in_a_world_of_three() -> None:
    x = parts(3, 6, 3)

    def work(comm: GlooCollectives, rank: int) -> None:
        mine = x[rank]
        total = ordered_sum(torch.stack(x))
        assert torch.equal(comm.all_reduce(mine, "tensor"), total)
        for dim in (0, 1, -1):
            assert torch.equal(comm.all_gather(mine, "tensor", dim), torch.cat(x, dim))
            wanted = total.chunk(3, dim)[rank]
            assert torch.equal(comm.reduce_scatter(mine, "tensor", dim), wanted)
        swapped = comm.all_to_all(mine.reshape(3, 2, 3), "tensor")
        assert torch.equal(swapped, torch.stack([part.reshape(3, 2, 3)[rank] for part in x]))
        if rank == 0:
            comm.send(mine.T, "tensor", 2)
        if rank == 2:
            assert torch.equal(comm.receive(torch.empty(3, 6), "tensor", 0), x[0].T)

    in_ranks(3, talking(work))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16, torch.bool, torch.uint8])
def test_parts_of_any_dtype_are_gathered(dtype: torch.dtype) -> None:
    def work(comm: GlooCollectives, rank: int) -> Tensor:
        return comm.all_gather(torch.tensor([rank, 1]).to(dtype), "tensor", 0)

    wanted = torch.tensor([0, 1, 1, 1]).to(dtype)
    assert all(torch.equal(found, wanted) for found in in_ranks(2, talking(work)))


def test_nothing_and_tensors_with_gaps_are_exchanged_too() -> None:
    def work(comm: GlooCollectives, rank: int) -> None:
        assert comm.all_reduce(torch.ones(0, 3), "tensor").shape == (0, 3)
        assert comm.all_gather(torch.ones(2, 0), "tensor", 0).shape == (4, 0)
        grid = torch.arange(12.0).reshape(3, 4)
        assert torch.equal(comm.all_reduce(grid.T[1:], "tensor"), grid.T[1:] * 2)
        assert torch.equal(comm.all_reduce(torch.tensor(3.0), "tensor"), torch.tensor(6.0))

    in_ranks(2, talking(work))


def test_results_are_new_tensors() -> None:
    def work(comm: GlooCollectives, rank: int) -> None:
        x = torch.full((4,), float(rank))
        first = comm.all_reduce(x, "tensor")
        comm.all_reduce(x + 5, "tensor")
        assert first.tolist() == [1.0] * 4
        assert x.tolist() == [rank] * 4

    in_ranks(2, talking(work))


def test_a_group_of_one_rank_gives_what_it_gets() -> None:
    def work(comm: GlooCollectives, rank: int) -> None:
        x = torch.randn(2, 2)
        assert comm.all_reduce(x, "alone") is x
        assert comm.all_gather(x, "alone", 1) is x
        assert comm.reduce_scatter(x, "alone", 1) is x
        assert comm.all_to_all(x, "alone") is x

    in_ranks(2, talking(work))


def test_what_cannot_be_cut_evenly_is_refused() -> None:
    def work(comm: GlooCollectives, rank: int) -> None:
        with pytest.raises(ValueError, match="3 entries cannot be cut into 2"):
            comm.reduce_scatter(torch.ones(3), "tensor", 0)

    in_ranks(2, talking(work))


def test_backends_of_the_same_processes_meet_apart() -> None:
    def work(launch: Launch) -> list[float]:
        first, second = GlooCollectives(launch), GlooCollectives(launch)
        x = torch.tensor([float(launch.worker.rank + 1)])
        found = [first.all_reduce(x, "tensor").item(), second.all_reduce(x * 2, "tensor").item()]
        first.close()
        return [*found, second.all_reduce(x, "tensor").item()]

    assert in_ranks(2, work) == [[3, 6, 3]] * 2


def test_a_silent_rank_is_lost() -> None:
    def work(comm: GlooCollectives, rank: int) -> None:
        if rank == 0:
            with pytest.raises(PeerLost, match=r"silent for 0\.3 s") as caught:
                comm.all_reduce(torch.ones(2), "tensor")
            assert HostRuntime().classify(caught.value) == "device_lost"
            assert "\n" not in str(caught.value)
        else:
            time.sleep(1)

    in_ranks(2, talking(work, step_s=0.3))


def test_a_rank_that_hangs_up_is_lost_at_once() -> None:
    def work(comm: GlooCollectives, rank: int) -> None:
        if rank == 1:
            return
        began = time.monotonic()
        with pytest.raises(PeerLost, match="hung up"):
            comm.all_gather(torch.ones(2), "tensor", 0)
        assert time.monotonic() - began < 5

    in_ranks(2, talking(work))


def test_whoever_meets_nobody_says_so() -> None:
    store, address = serve(5)
    with pytest.raises(PeerLost, match=r"rank 0 met nobody at tcp://127.0.0.1:\d+ within 0.4 s"):
        GlooCollectives(launches(2, address)[0], meet_s=0.4)
    del store
    with pytest.raises(PeerLost, match="met nobody"):
        GlooCollectives(launches(2, address)[0], meet_s=0.4)


def test_a_world_of_one_meets_nobody() -> None:
    launch = replace(launches(1, "")[0], groups={"tensor": (0,)})
    comm = join(launch)
    assert isinstance(comm, SingleRank)
    x = torch.ones(2)
    assert comm.all_reduce(x, "tensor") is comm.all_gather(x, "tensor", 0) is x
    comm.close()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(2, 4))
def test_sums_of_any_sizes_follow_each_other(sizes: list[int], ranks: int) -> None:
    def work(comm: GlooCollectives, rank: int) -> list[Tensor]:
        return [
            comm.all_reduce(torch.full((n,), float(rank + k)), "tensor")
            for k, n in enumerate(sizes)
        ]

    for found in in_ranks(ranks, talking(work)):
        for k, (n, total) in enumerate(zip(sizes, found, strict=True)):
            assert total.tolist() == [sum(range(ranks)) + k * ranks] * n
