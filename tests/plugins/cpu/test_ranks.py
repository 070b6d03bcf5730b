"""Shards on the CPU: processes that share its cores."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from chipset.backends.errors import Incompatible
from chipset.backends.options import ParallelOptions
from chipset.backends.plugin import Probe, WorkerSpec
from chipset.plugins.cpu.plugin import CPUPlugin
from chipset.plugins.cpu.threads import num_threads


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def plan(tensor: int, num_hosts: int = 1) -> Sequence[WorkerSpec]:
    plugin = CPUPlugin()
    hosts: list[Probe] = [plugin.probe()] * num_hosts
    return plugin.worker_plan(ParallelOptions(tensor=tensor), hosts)


def test_one_shard_is_a_process_with_all_cores() -> None:
    assert plan(1) == [WorkerSpec(rank=0, local_rank=0, host=0, devices=(0,))]


@pytest.mark.parametrize("tensor", [2, 3, 64])
def test_shards_share_the_cores_and_talk_on_this_host_only(tensor: int) -> None:
    workers = plan(tensor)
    assert [worker.rank for worker in workers] == list(range(tensor))
    assert {worker.devices for worker in workers} == {(0,)}
    for worker in workers:
        assert worker.environment == {
            "OMP_NUM_THREADS": str(max(1, num_threads() // tensor)),
            "GLOO_SOCKET_IFNAME": "lo",
        }


def test_shards_are_dealt_to_several_hosts() -> None:
    workers = plan(4, num_hosts=2)
    assert [worker.host for worker in workers] == [0, 0, 1, 1]
    assert all("GLOO_SOCKET_IFNAME" not in worker.environment for worker in workers)
    assert len(plan(128, num_hosts=2)) == 128


def test_more_shards_than_a_host_should_hold_are_refused() -> None:
    with pytest.raises(Incompatible, match="65 shards: at most 64"):
        plan(65)
