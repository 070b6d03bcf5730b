"""Everything that is decided before a device is touched: who works, on what part of the model, with which options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..backends.capabilities import Capabilities
from ..backends.errors import Incompatible, PluginError
from ..backends.options import EngineOptions, ParallelOptions
from ..backends.plugin import Launch, Plugin, Probe, WorkerSpec
from .models.config import ModelConfig
from .models.shard import Shard
from .models.spec import model_spec
from .nodes import Nodes

NEEDED = ("all_gather", "all_reduce")
"""Collectives without which a model cannot be cut."""


def all_devices(options: EngineOptions, plugin: Plugin, probe: Probe) -> EngineOptions:
    """Options for as many ranks as the probe found devices. Raises Incompatible where that is one."""
    if probe.num_devices < 2:
        raise Incompatible(
            f"--sharded true: backend {plugin.info.name} found {probe.num_devices} device here; "
            "leave it out, or say --num-shard N"
        )
    return replace(options, parallel=ParallelOptions(tensor=probe.num_devices))


def plan_launches(
    plugin: Plugin,
    hosts: Sequence[Probe],
    config: ModelConfig,
    options: EngineOptions,
    *,
    packed: bool = False,
) -> list[Launch]:
    """By rank; `rendezvous` is left open. `packed`: of weights. Raises Incompatible and PluginError."""
    capabilities = plugin.capabilities(hosts[0])
    workers = plugin.worker_plan(options.parallel, hosts)
    _check_workers(plugin, workers, options.parallel, capabilities)
    world = len(workers)
    shards = [Shard(rank=rank, size=world) for rank in range(world)]
    # parts have one size, so that one rank's answers hold for all
    asked = model_spec(config, dtype="float32", shard=shards[0], packed=packed)
    resolved = plugin.resolve(options, asked, capabilities)
    specs = [
        model_spec(
            config,
            dtype=resolved.dtype,
            kv_dtype=resolved.kv_dtype,
            max_context=resolved.max_context,
            shard=shard,
            packed=packed,
        )
        for shard in shards
    ]
    shapes = plugin.shapes(resolved, specs[0])
    return [
        Launch(
            plugin=plugin.info.name,
            worker=worker,
            world_size=world,
            rendezvous="",
            groups={"tensor": tuple(range(world))},
            capabilities=capabilities,
            options=resolved,
            model=spec,
            shapes=shapes,
        )
        for worker, spec in zip(workers, specs, strict=True)
    ]


def check_places(launches: Sequence[Launch], nodes: Nodes) -> None:
    """Raises Incompatible where the plan is not one worker for each process that torchrun started, on its host."""
    places = [launch.worker.host for launch in launches]
    if places != [rank // nodes.ranks_per_host for rank in range(nodes.num_ranks)]:
        raise Incompatible(
            f"torchrun started {nodes.num_ranks} processes, {nodes.ranks_per_host} a host; backend "
            f"{launches[0].plugin} wants its workers on hosts {places}: start it without torchrun"
        )


def _check_workers(
    plugin: Plugin,
    workers: Sequence[WorkerSpec],
    parallel: ParallelOptions,
    capabilities: Capabilities,
) -> None:
    name, world = plugin.info.name, len(workers)
    if world not in (1, parallel.tensor) or [w.rank for w in workers] != list(range(world)):
        raise PluginError(
            f"backend {name} plans ranks {[w.rank for w in workers]} for {parallel.tensor} shards; "
            "it must be one worker, or one for each"
        )
    missing = [one for one in NEEDED if one not in capabilities.collectives]
    if world > 1 and missing:
        raise Incompatible(
            f"--num-shard {world}: backend {name} has no {' and no '.join(missing)}, so it cannot "
            "cut a model; use --num-shard 1, or another --backend"
        )
