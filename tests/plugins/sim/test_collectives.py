"""Ranks on emulated devices: one recorded operation a call, and no look at the device by the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from chipset.backends.conformance.session import Session, make_launch
from chipset.backends.conformance.suite import small_model
from chipset.backends.errors import Incompatible
from chipset.backends.options import EngineOptions, ParallelOptions
from chipset.backends.plugin import WorkerSpec
from chipset.backends.reference.collectives import PeerLost, RankCollectives
from chipset.backends.reference.operators import OperatorCollectives
from chipset.backends.registry import Registry
from chipset.plugins.sim import device, watch
from chipset.plugins.sim.runtime import SimRuntime
from chipset.plugins.sim.tape import record

from .sims import decode, table


class Three(RankCollectives):
    """The other two ranks have what was put into `others`."""

    def __init__(self) -> None:
        self.others = torch.zeros(2)

    def size(self, group: str) -> int:
        return 3

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        if self.others.isnan().any():
            raise PeerLost("a rank is gone")
        return x + self.others.sum()

    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        return torch.cat((x, *(torch.full_like(x, float(other)) for other in self.others)), dim)


@pytest.fixture
def ranks() -> Iterator[tuple[OperatorCollectives, Three]]:
    device.load()
    host = Three()
    comm = OperatorCollectives(host)
    with torch.inference_mode():
        yield comm, host
    comm.close()


def put(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).to("sim")


def host_values(tensor: Tensor) -> list[float]:
    with watch.reading():
        found: list[float] = tensor.cpu().tolist()
    return found


def test_a_replay_communicates_anew(ranks: tuple[OperatorCollectives, Three]) -> None:
    comm, host = ranks
    host.others = torch.tensor([1.0, 2.0])

    def function(x: Tensor) -> Tensor:
        return comm.all_gather(comm.all_reduce(x, "tensor") * 2, "tensor", 0)

    tape, made = record("f", function, [], (put(1, 5),))
    assert host_values(made) == [8, 16, 1, 1, 2, 2]
    host.others = torch.tensor([10.0, 20.0])
    assert host_values(tape.replay([put(1, 5)])) == [62, 70, 10, 10, 20, 20]


def test_a_call_is_one_kernel_of_the_device_and_no_copy(
    ranks: tuple[OperatorCollectives, Three],
) -> None:
    comm, _ = ranks
    x = put(1, 2)
    before = watch.counts()
    comm.all_reduce(x, "tensor")
    moved = watch.counts() - before
    assert (moved.kernels, moved.reads, moved.uploads) == (1, 0, 0)


def test_a_lost_rank_passes_through_the_device(ranks: tuple[OperatorCollectives, Three]) -> None:
    comm, host = ranks
    host.others = torch.tensor([float("nan"), 0.0])
    with pytest.raises(PeerLost, match="a rank is gone") as caught:
        comm.all_reduce(put(1), "tensor")
    assert SimRuntime({}, 0).classify(caught.value) == "device_lost"


@pytest.mark.parametrize("name", ["sim-gaudi", "sim-gpu", "sim-neuron"])
def test_a_shard_is_a_process_with_a_device_of_its_own(name: str) -> None:
    plugin = Registry.discover().select(name).plugin
    workers = plugin.worker_plan(ParallelOptions(tensor=8), [plugin.probe()])
    assert [worker.devices for worker in workers] == [(rank,) for rank in range(8)]
    assert all("GLOO_SOCKET_IFNAME" in w.environment for w in workers)
    with pytest.raises(Incompatible, match="9 devices wanted, 8 found"):
        plugin.worker_plan(ParallelOptions(tensor=9), [plugin.probe()])


def test_a_tpu_is_one_process_that_has_nobody_to_talk_to() -> None:
    plugin = Registry.discover().select("sim-tpu").plugin
    options = EngineOptions(parallel=ParallelOptions(tensor=4))
    launch = make_launch(plugin, small_model(), options)
    assert launch.worker == WorkerSpec(rank=0, local_rank=0, host=0, devices=(0, 1, 2, 3))
    assert (launch.world_size, launch.groups) == (1, {"tensor": (0,)})


def test_a_worker_uses_its_own_device_only() -> None:
    plugin = Registry.discover().select("sim-gaudi").plugin
    asked = EngineOptions(max_batch_tokens=64, max_context=64, max_batch_rows=4)
    launch = make_launch(plugin, small_model(), asked)
    launch = replace(launch, worker=replace(launch.worker, devices=(3,)))
    device.load()
    held = [device.memory_allocated(index) for index in range(8)]
    session = Session(plugin, launch.model, launch=launch, num_blocks=8)
    try:
        assert session.backend.runtime.device == torch.device("sim", 3)
        session.draw(table(session), session.batch([decode()]))
        others = [device.memory_allocated(index) for index in range(8) if index != 3]
        assert others == held[:3] + held[4:]
        assert device.memory_allocated(3) > held[3]
    finally:
        session.close()
        device.set_device(0)
