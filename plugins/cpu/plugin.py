"""The parent half: what this CPU can do. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...backends.capabilities import Capabilities
from ...backends.hookspecs import hookimpl
from ...backends.options import EngineOptions, ModelSpec, ParallelOptions, ResolvedOptions
from ...backends.plugin import API_VERSION, Launch, Plugin, PluginInfo, Probe, WorkerSpec
from ...backends.reference.resolve import resolve
from ...backends.reference.workers import sharing_hosts, spread
from ...backends.shapes import BatchPolicy, DynamicShapes, ShapePolicy
from .cpuinfo import CPUINFO, architecture
from .options import MAX_RANKS, defaults
from .threads import num_threads

if TYPE_CHECKING:
    from ...backends.backend import Backend


class CPUPlugin(Plugin):
    """Torch on the CPU."""

    info = PluginInfo(
        name="cpu",
        api_version=API_VERSION,
        distribution="chipset",
        summary="torch on the CPU",
        environment=("OMP_NUM_THREADS",),
    )

    def __init__(self, cpuinfo: Path = CPUINFO) -> None:
        self.cpuinfo = cpuinfo

    def probe(self) -> Probe:
        """Always there, and the last choice of `auto`."""
        found = architecture(self.cpuinfo)
        return Probe(
            available=True,
            num_devices=1,
            reason=f"every machine has a CPU; this one is {found}",
            found_hardware=True,
            architecture=found,
        )

    def capabilities(self, probe: Probe) -> Capabilities:  # noqa: ARG002 - the same on every CPU
        """See Plugin.capabilities.

        The KV budget is predicted: other processes and the file cache share this memory, so running the largest step
        would measure no better, only delay the start.
        """
        return Capabilities(
            device_type="cpu",
            dtypes=frozenset({"float32", "bfloat16"}),
            kv_dtypes=frozenset(
                ("auto", "float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
            ),
            block_sizes=(32, 16, 64, 128),
            kv_budget="predict",
            chunked_prefill=True,
            prefix_cache=True,
            preemption=True,
            attention=frozenset({"window", "soft_cap", "sinks", "alibi"}),
            features=frozenset(
                ("sampled", "filters", "penalties", "bias", "bitmask", "targets", "logprobs")
            ),
            collectives=frozenset(
                ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_receive")
            ),
        )

    def worker_plan(
        self, parallel: ParallelOptions, hosts: Sequence[Probe]
    ) -> Sequence[WorkerSpec]:
        """Any number of processes up to MAX_RANKS a host, which share its cores."""
        plan = spread(parallel.tensor * parallel.pipeline, len(hosts), MAX_RANKS)
        return sharing_hosts(plan, num_threads())

    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        """See Plugin.resolve."""
        return resolve(
            options, model, capabilities, defaults(architecture(self.cpuinfo), packed=model.packed)
        )

    def shapes(self, options: ResolvedOptions, model: ModelSpec) -> ShapePolicy:  # noqa: ARG002
        """Exact sizes: torch runs any shape."""
        policy = BatchPolicy(
            max_rows=options.max_batch_rows,
            max_tokens=options.max_batch_tokens,
            max_context=options.max_context,
        )
        return DynamicShapes(policy, options.block_size)

    def create(self, launch: Launch) -> Backend:
        """Import torch and set its threads."""
        from .backend import CPUBackend

        return CPUBackend(launch)


@hookimpl
def backend_plugin() -> Plugin:
    """The plugin of the entry point `cpu`."""
    return CPUPlugin()
