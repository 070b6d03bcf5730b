"""Who works on what: plans that hold, and those that are refused with their cure."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import NullPlugin

from chipset.backends.capabilities import Capabilities
from chipset.backends.errors import Incompatible, PluginError
from chipset.backends.options import EngineOptions, ParallelOptions
from chipset.backends.plugin import Launch, Probe, WorkerSpec
from chipset.core.conformance.checkpoint import FULL, make_checkpoint
from chipset.core.models.config import ModelConfig
from chipset.core.models.families import load_config
from chipset.core.nodes import Nodes
from chipset.core.plan import all_devices, check_places, plan_launches

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


class Cards(NullPlugin):
    """A device with so many cards; `plan` overrides what it plans."""

    def __init__(self, count: int, collectives: Sequence[str] = ("all_reduce", "all_gather")):
        self.count = count
        self.collectives = frozenset(collectives)
        self.plan: list[WorkerSpec] | None = None

    def probe(self) -> Probe:
        return replace(super().probe(), num_devices=self.count)

    def capabilities(self, probe: Probe) -> Capabilities:
        return replace(super().capabilities(probe), collectives=self.collectives)

    def worker_plan(
        self, parallel: ParallelOptions, hosts: Sequence[Probe]
    ) -> Sequence[WorkerSpec]:
        return self.plan or super().worker_plan(parallel, hosts)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder: Path = tmp_path_factory.mktemp("model")
    return load_config(make_checkpoint(FULL, folder).config)


def planned(plugin: Cards, config: ModelConfig, count: int, num_hosts: int = 1) -> list[Launch]:
    options = EngineOptions(parallel=ParallelOptions(tensor=count))
    return plan_launches(plugin, [plugin.probe()] * num_hosts, config, options)


def test_each_rank_is_told_its_part_and_who_the_others_are(config: ModelConfig) -> None:
    launches = planned(Cards(2), config, 2)
    assert [launch.worker.rank for launch in launches] == [0, 1]
    for launch in launches:
        assert (launch.world_size, launch.groups) == (2, {"tensor": (0, 1)})
        assert launch.model.groups[0].num_kv_heads == 1
        assert launch.model.attention[0].num_heads == 2
        assert launch.model.vocab_size == config.vocab_size
    assert launches[0].model.weight_bytes == launches[1].model.weight_bytes
    assert launches[0].shapes is launches[1].shapes


def test_one_rank_holds_it_all(config: ModelConfig) -> None:
    [launch] = planned(Cards(4), config, 1)
    assert (launch.world_size, launch.groups) == (1, {"tensor": (0,)})
    assert launch.model.groups[0].num_kv_heads == 2


def test_a_worker_of_several_devices_holds_it_all(config: ModelConfig) -> None:
    plugin = Cards(4, collectives=())
    plugin.plan = [WorkerSpec(rank=0, local_rank=0, host=0, devices=(0, 1, 2, 3))]
    [launch] = planned(plugin, config, 4)
    assert launch.model.groups[0].num_kv_heads == 2
    assert launch.worker.devices == (0, 1, 2, 3)


def test_too_few_devices_are_told_with_their_number(config: ModelConfig) -> None:
    with pytest.raises(Incompatible, match="3 devices wanted, 2 found; lower the number of shards"):
        planned(Cards(2), config, 3)


@pytest.mark.parametrize("missing", ["all_reduce", "all_gather"])
def test_a_backend_that_cannot_cut_a_model_is_told(config: ModelConfig, missing: str) -> None:
    plugin = Cards(2, collectives=sorted({"all_reduce", "all_gather"} - {missing}))
    with pytest.raises(Incompatible, match=f"null has no {missing}.*--num-shard 1"):
        planned(plugin, config, 2)
    assert len(planned(plugin, config, 1)) == 1


@pytest.mark.parametrize("ranks", [[0, 1, 2], [1, 0], [0, 2], []])
def test_a_plan_of_other_ranks_is_the_plugins_fault(config: ModelConfig, ranks: list[int]) -> None:
    plugin = Cards(4)
    plugin.plan = [WorkerSpec(rank=rank, local_rank=0, host=0, devices=(0,)) for rank in ranks]
    if not ranks:
        plugin.worker_plan = lambda *_: []  # type: ignore[method-assign]
    with pytest.raises(PluginError, match="plans ranks"):
        planned(plugin, config, 2)


def test_sharded_takes_all_devices_that_there_are() -> None:
    plugin = Cards(4)
    assert all_devices(EngineOptions(), plugin, plugin.probe()).parallel.tensor == 4
    with pytest.raises(Incompatible, match="found 1 device here; leave it out, or say --num-shard"):
        all_devices(EngineOptions(), plugin, Cards(1).probe())


def test_torchruns_variables_are_read() -> None:
    nodes = Nodes.read(TORCHRUN)
    assert nodes == Nodes(rank=3, num_ranks=4, ranks_per_host=2, address="10.0.0.1", port=29500)
    assert Nodes.read({**TORCHRUN, "WORLD_SIZE": "1"}) is None
    del (alone := dict(TORCHRUN))["TORCHELASTIC_RUN_ID"]
    assert Nodes.read(alone) is None


def test_torchruns_processes_are_the_ranks(config: ModelConfig) -> None:
    nodes = Nodes.read(TORCHRUN)
    assert nodes is not None
    plugin = Cards(8)
    options = nodes.options(EngineOptions())
    launches = plan_launches(plugin, nodes.hosts(plugin.probe()), config, options)
    assert [launch.worker.host for launch in launches] == [0, 0, 1, 1]
    check_places(launches, nodes)
    with pytest.raises(Incompatible, match="start it without torchrun"):
        check_places(launches[:1], nodes)


def test_another_number_of_shards_than_torchruns_is_refused() -> None:
    nodes = Nodes.read(TORCHRUN)
    assert nodes is not None
    asked = EngineOptions(parallel=ParallelOptions(tensor=2))
    with pytest.raises(Incompatible, match="--num-shard 2: torchrun started 4"):
        nodes.options(asked)
