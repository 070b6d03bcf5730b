"""Memory that ranks share: the sums of gloo, bit for bit, whatever the size; and nothing is left of it."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_threads import in_ranks
from torch import Tensor

from chipset.backends.plugin import Launch
from chipset.backends.reference.collectives import GlooCollectives, PeerLost, ordered_sum
from chipset.plugins.cpu.collectives import CPUCollectives
from chipset.plugins.cpu.shared_memory import CAPACITY, SharedMemory, meet, native

T = TypeVar("T")
PIECE = CAPACITY // 4
"""Numbers of float32 that a buffer holds."""


def sharing(work: Callable[[SharedMemory, int], T], step_s: float = 8) -> Callable[[Launch], T]:
    """`work` gets the memory of the group "tensor", and the rank."""

    def run(launch: Launch) -> T:
        gloo = GlooCollectives(launch)
        memory = meet(gloo.meetings["tensor"], step_s=step_s)
        assert isinstance(memory, SharedMemory), memory
        try:
            return work(memory, launch.worker.rank)
        finally:
            gloo.close()

    return run


def parts(size: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(size)]


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bytes(found.contiguous().view(torch.uint8).numpy()) == (
        bytes(wanted.contiguous().view(torch.uint8).numpy())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_sum_has_the_bits_of_the_reference(ranks: int, dtype: torch.dtype) -> None:
    counts = (1, 7, 2048, 2049, 10_000, PIECE, PIECE + 1, 2 * PIECE + 5, 5 * PIECE - 3)
    x = {count: parts(ranks, count, dtype=dtype) for count in counts}

    def work(memory: SharedMemory, rank: int) -> None:
        for count in counts:
            wanted = ordered_sum(torch.stack(x[count]))
            assert same_bits(memory.all_reduce(x[count][rank]), wanted), count

    in_ranks(ranks, sharing(work))


def test_bfloat16_rounds_as_torch_does() -> None:
    inf, nan, tiny = float("inf"), float("nan"), 2.0**-133
    first = torch.tensor([1.0, 1.0, -1.0, 3e38, inf, -inf, nan, tiny, -0.0, 257.0])
    second = torch.tensor([2**-9, 3 * 2**-9, -(2**-9), 3e38, -inf, -inf, 1.0, tiny, -0.0, 0.5])
    x = [first.bfloat16(), second.bfloat16()]

    def work(memory: SharedMemory, rank: int) -> Tensor:
        return memory.all_reduce(x[rank])

    wanted = (x[0].float() + x[1].float()).bfloat16()
    for found in in_ranks(2, sharing(work)):
        number = ~wanted.isnan()
        assert same_bits(found[number], wanted[number])
        assert found.isnan().equal(wanted.isnan())


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.float16])
def test_other_dtypes_are_summed_too(dtype: torch.dtype) -> None:
    x = [torch.arange(12).reshape(3, 4).to(dtype) * (rank + 1) for rank in range(3)]

    def work(memory: SharedMemory, rank: int) -> Tensor:
        return memory.all_reduce(x[rank])

    wanted = ordered_sum(torch.stack(x))
    assert all(same_bits(found, wanted) for found in in_ranks(3, sharing(work)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (1, PIECE + 3), (PIECE + 3, 1), (0, 3)])
def test_parts_lie_side_by_side(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = parts(2, *shape, dtype=dtype)

    def work(memory: SharedMemory, rank: int) -> None:
        for dim in range(-1, len(shape)):
            assert same_bits(memory.all_gather(x[rank], dim), torch.cat(x, dim))

    in_ranks(2, sharing(work))


def test_tensors_with_gaps_and_single_numbers_are_exchanged() -> None:
    def work(memory: SharedMemory, rank: int) -> None:
        grid = torch.arange(12.0).reshape(3, 4)
        assert torch.equal(memory.all_reduce(grid.T[1:]), grid.T[1:] * 2)
        assert torch.equal(memory.all_gather(grid[:, 1:2], 1), grid[:, 1:2].expand(3, 2))
        assert torch.equal(memory.all_reduce(torch.tensor(3.0)), torch.tensor(6.0))
        assert memory.all_reduce(torch.ones(0, 2)).shape == (0, 2)

    in_ranks(2, sharing(work))


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), min_size=1, max_size=60),
    st.integers(2, 5),
)
def test_calls_by_turns_never_mix(calls: list[tuple[bool, int]], ranks: int) -> None:
    def work(memory: SharedMemory, rank: int) -> None:
        kept = []
        for number, (is_sum, count) in enumerate(calls):
            x = torch.full((count,), float(rank + number))
            kept.append(memory.all_reduce(x) if is_sum else memory.all_gather(x, 0))
            if rank == number % ranks:
                time.sleep(0.0005)
        for number, (is_sum, count) in enumerate(calls):
            each = [rank + number for rank in range(ranks)]
            wanted = [sum(each)] * count if is_sum else [one for one in each for _ in range(count)]
            assert kept[number].tolist() == wanted

    in_ranks(ranks, sharing(work))


def test_a_silent_rank_is_lost_for_good() -> None:
    def work(memory: SharedMemory, rank: int) -> None:
        if rank == 1:
            time.sleep(1)
            return
        with pytest.raises(PeerLost, match="rank 1 of the group was silent"):
            memory.all_reduce(torch.ones(3))
        began = time.monotonic()
        with pytest.raises(PeerLost, match="before"):
            memory.all_gather(torch.ones(3), 0)
        assert time.monotonic() - began < 0.2

    in_ranks(2, sharing(work, step_s=0.3))


def test_a_rank_whose_process_ended_is_lost_at_once() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def work(memory: SharedMemory, rank: int) -> None:
        if rank == 1:
            return
        memory._group.processes[1] = ended.pid
        began = time.monotonic()
        with pytest.raises(PeerLost, match="rank 1 of the group is gone"):
            memory.all_reduce(torch.ones(3))
        assert time.monotonic() - began < 4

    in_ranks(2, sharing(work))


def test_ranks_that_call_different_members_are_told() -> None:
    def work(memory: SharedMemory, rank: int) -> None:
        x = torch.ones(3)
        with pytest.raises(PeerLost, match="called another member"):
            memory.all_gather(x, 0) if rank else memory.all_reduce(x)

    in_ranks(2, sharing(work, step_s=2))


def test_nothing_is_left_of_it() -> None:
    def num_maps() -> int:
        return Path("/proc/self/maps").read_text().count("chipset-ranks")

    def num_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def work(memory: SharedMemory, rank: int) -> None:
        memory.all_reduce(torch.ones(3))
        assert num_maps() > 0

    in_ranks(2, sharing(work))
    handles = num_files()
    in_ranks(2, sharing(work))
    assert num_maps() == 0
    assert num_files() <= handles
    assert not list(Path("/dev/shm").glob("*chipset*"))


def test_without_a_compiler_all_ranks_take_gloo_and_one_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CHIPSET_CACHE", str(tmp_path))

    def work(launch: Launch) -> tuple[str, float]:
        # only one of them is without: its file system, say, cannot be written to
        compiler = "cc" if launch.worker.rank == 0 else "no-such-compiler"
        comm = CPUCollectives(launch, native(compiler))
        summed = comm.all_reduce(torch.ones(1), "tensor").item()
        assert not comm.memories
        comm.close()
        return comm.reasons["tensor"], summed

    with caplog.at_level(logging.WARNING):
        found = in_ranks(2, work)
    assert [summed for _, summed in found] == [2, 2]
    assert len({reason for reason, _ in found}) == 1
    assert "rank 1: memory shared by ranks needs the compiler no-such-compiler" in found[0][0]
    assert "apt-get install gcc" in found[0][0]
    assert [record.message for record in caplog.records] == [
        f"ranks of group tensor talk over gloo, which is slow: {found[0][0]}"
    ]


def test_ranks_of_several_hosts_take_gloo() -> None:
    def work(launch: Launch) -> tuple[str, float]:
        rank = launch.worker.rank
        comm = CPUCollectives(replace(launch, worker=replace(launch.worker, host=rank // 2)))
        summed = comm.all_reduce(torch.ones(1), "tensor").item()
        comm.close()
        return comm.reasons["tensor"], summed

    assert in_ranks(3, work) == [("several hosts", 3.0)] * 3


def test_ranks_of_one_host_share_memory() -> None:
    def work(launch: Launch) -> float:
        comm = CPUCollectives(launch)
        assert set(comm.memories) == {"tensor"}
        x = torch.ones(1)
        assert comm.all_reduce(x, "alone") is comm.all_gather(x, "alone", 0) is x
        assert comm.all_gather(x, "tensor", 0).tolist() == [1, 1]
        total = comm.reduce_scatter(comm.all_reduce(torch.ones(2), "tensor"), "tensor", 0)
        comm.close()
        return total.item()

    assert in_ranks(2, work) == [4, 4]
