"""The parent half of sim-tpu. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...backends.capabilities import Capabilities
from ...backends.hookspecs import hookimpl
from ...backends.options import ModelSpec, ParallelOptions, ResolvedOptions
from ...backends.plugin import API_VERSION, Launch, Plugin, PluginInfo, Probe, WorkerSpec
from ...backends.reference.workers import one_worker
from ...backends.shapes import BatchPolicy, ShapePolicy
from .plugin import ATTENTION, COLLECTIVES, DTYPES, FEATURES, SimPlugin
from .shapes import FiniteShapes, token_buckets

if TYPE_CHECKING:
    from ...backends.backend import Backend


class SimTPUPlugin(SimPlugin):
    """A TPU's rules: one family of buckets, fused steps, the cache given away, no infinities."""

    info = PluginInfo(
        name="sim-tpu",
        api_version=API_VERSION,
        distribution="chipset",
        summary="a TPU's rules, simulated: one bucket family, fused steps; tests the engine, no kernels",
    )

    def capabilities(self, probe: Probe) -> Capabilities:  # noqa: ARG002 - all are alike
        """See Plugin.capabilities."""
        return Capabilities(
            device_type="sim",
            graphs="compile",
            dtypes=DTYPES,
            kv_dtypes=DTYPES | {"auto"},
            fp8_max=448.0,
            block_sizes=(32, 16, 64),
            kv_budget="predict",
            chunked_prefill=True,
            prefix_cache=True,
            preemption=True,
            overlapped_steps=True,
            fused_draw=True,
            attention=ATTENTION,
            collectives=COLLECTIVES - {"send_receive"},
            features=FEATURES,
        )

    def worker_plan(
        self, parallel: ParallelOptions, hosts: Sequence[Probe]
    ) -> Sequence[WorkerSpec]:
        """One worker for all devices: the core cuts nothing, and collectives are identities."""
        return one_worker(parallel.tensor * parallel.pipeline, hosts)

    def shapes(self, options: ResolvedOptions, model: ModelSpec) -> ShapePolicy:  # noqa: ARG002
        """See Plugin.shapes."""
        policy = BatchPolicy(
            max_rows=options.max_batch_rows,
            max_tokens=options.max_batch_tokens,
            max_context=options.max_context,
        )
        size = options.block_size
        listed = list(token_buckets(policy, size))
        return FiniteShapes(policy, size, (frozenset(), FEATURES), listed)

    def create(self, launch: Launch) -> Backend:
        """See Plugin.create."""
        from .backend import SimBackend

        return SimBackend(launch, in_place=False, infinities=False)


@hookimpl
def backend_plugin() -> Plugin:
    """The plugin of the entry point `sim-tpu`."""
    return SimTPUPlugin()
