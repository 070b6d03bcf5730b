"""Worlds of processes: what goes wrong in one of them is found, and none is left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch

from chipset.backends.backend import Backend
from chipset.backends.conformance.ranks import Rank, run_world
from chipset.backends.plugin import Launch
from chipset.backends.step import F32

from .mutation import importable_name
from .reference_plugin import ReferencePlugin

ROOT = Path(__file__).parents[3]


class Unmade(ReferencePlugin):
    def create(self, launch: Launch) -> Backend:
        raise RuntimeError(f"no device for rank {launch.worker.rank}")


def number_of_the_rank(rank: Rank) -> Sequence[F32]:
    return [np.full(1, rank.number, np.float32)]


def number_of_ranks(rank: Rank) -> Sequence[F32]:
    return [rank.exchange(lambda comm, x: comm.all_reduce(x, "tensor"), torch.ones(2))]


def wrong_on_one(rank: Rank) -> Sequence[F32]:
    assert rank.number != 1, "seven is not eight"
    return []


def broken_on_one(rank: Rank) -> Sequence[F32]:
    if rank.number == 1:
        raise KeyError("no such thing")
    return []


CHECKS = [
    importable_name(check)
    for check in (
        number_of_ranks,
        number_of_the_rank,
        wrong_on_one,
        broken_on_one,
        number_of_ranks,
    )
]


def test_what_ranks_find_is_told_by_name_and_nothing_is_left() -> None:
    names = [importable_name(ReferencePlugin), importable_name(Unmade)]
    found = run_world(ReferencePlugin(), names, 2, CHECKS[:4], is_quick=True, folders=[str(ROOT)])
    assert not psutil.Process().children()
    whole, unmade = found[names[0]], found[names[1]]
    sums, numbers, wrong, broken = (whole[check] for check in CHECKS[:4])
    assert [finding.error for finding in (*sums, *numbers)] == [""] * 4
    assert sums[0].bits == sums[1].bits
    assert numbers[0].bits != numbers[1].bits
    assert [finding.error for finding in wrong] == ["", "seven is not eight"]
    assert broken[0].error == ""
    assert broken[1].error.startswith("KeyError: 'no such thing' (test_ranks.py:")
    for rank, finding in enumerate(unmade[CHECKS[0]]):
        assert "ended with 1" in finding.error
        assert f"RuntimeError: no device for rank {rank}" in finding.error


def test_after_a_break_no_check_runs() -> None:
    checks = [CHECKS[3], CHECKS[1]]
    name = importable_name(ReferencePlugin)
    found = run_world(ReferencePlugin(), [name], 2, checks, is_quick=True, folders=[str(ROOT)])
    assert all("ended with 0 before it told" in finding.error for finding in found[name][checks[1]])
