"""Worker plans: who runs where, and what processes that share a host are told."""

from __future__ import annotations

import pytest

from chipset.backends.errors import Incompatible
from chipset.backends.plugin import Probe, WorkerSpec
from chipset.backends.reference.workers import one_worker, sharing_hosts, spread


def probe(num_devices: int) -> Probe:
    return Probe(available=True, num_devices=num_devices, reason="made by a test")


def places(plan: list[WorkerSpec]) -> list[tuple[int, int, int]]:
    return [(worker.rank, worker.host, worker.local_rank) for worker in plan]


def test_ranks_are_dealt_evenly_and_in_order() -> None:
    assert places(spread(4, 2, 64)) == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]
    assert places(spread(5, 2, 64)) == [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 0), (4, 1, 1)]
    assert places(spread(1, 3, 64)) == [(0, 0, 0)]


def test_too_many_ranks_are_refused_with_the_cure() -> None:
    assert len(spread(8, 2, 4)) == 8
    with pytest.raises(Incompatible, match=r"9 shards: at most 4 .* lower the number"):
        spread(9, 2, 4)


def test_ranks_of_a_host_share_its_threads_and_stay_on_it() -> None:
    told = sharing_hosts(spread(3, 1, 64), 8, environment={})
    for worker in told:
        assert worker.environment == {"OMP_NUM_THREADS": "2", "GLOO_SOCKET_IFNAME": "lo"}
    assert (
        sharing_hosts(spread(8, 1, 64), 2, environment={})[0].environment["OMP_NUM_THREADS"] == "1"
    )


def test_ranks_of_several_hosts_may_leave_them() -> None:
    told = sharing_hosts(spread(4, 2, 64), 8, environment={})
    assert [worker.environment for worker in told] == [{"OMP_NUM_THREADS": "4"}] * 4


def test_what_the_user_set_stays() -> None:
    mine = {"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "eth7"}
    assert not sharing_hosts(spread(2, 1, 64), 8, environment=mine)[0].environment
    empty = sharing_hosts(spread(2, 1, 64), 8, environment={"OMP_NUM_THREADS": ""})
    assert empty[0].environment["OMP_NUM_THREADS"] == "4"


def test_a_single_worker_is_told_nothing() -> None:
    plan = spread(1, 1, 64)
    assert sharing_hosts(plan, 8, environment={}) == plan


def test_one_worker_drives_all_devices() -> None:
    assert one_worker(4, [probe(8)]) == [
        WorkerSpec(rank=0, local_rank=0, host=0, devices=(0, 1, 2, 3))
    ]
    with pytest.raises(Incompatible, match="9 devices wanted, 8 found"):
        one_worker(9, [probe(8), probe(8)])
