"""The parent half of sim-neuron. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...backends.capabilities import Capabilities
from ...backends.hookspecs import hookimpl
from ...backends.options import ModelSpec, ResolvedOptions
from ...backends.plugin import API_VERSION, Launch, Plugin, PluginInfo, Probe
from ...backends.shapes import BatchPolicy, ShapePolicy
from .plugin import ATTENTION, COLLECTIVES, DTYPES, FEATURES, SimPlugin
from .shapes import FiniteShapes, prompt_buckets

if TYPE_CHECKING:
    from ...backends.backend import Backend


class SimNeuronPlugin(SimPlugin):
    """Neuron's rules: one whole prompt a step, no mixing, no preemption, the cache given away."""

    info = PluginInfo(
        name="sim-neuron",
        api_version=API_VERSION,
        distribution="chipset",
        summary="Neuron's rules, simulated: one whole prompt a step, no preemption; tests the engine, no kernels",
    )

    def capabilities(self, probe: Probe) -> Capabilities:  # noqa: ARG002 - all are alike
        """See Plugin.capabilities."""
        return Capabilities(
            device_type="sim",
            graphs="ahead_of_time",
            dtypes=DTYPES,
            kv_dtypes=DTYPES | {"auto"},
            fp8_max=240.0,
            block_sizes=(32,),
            kv_budget="predict",
            prefix_cache=True,
            attention=ATTENTION,
            collectives=COLLECTIVES - {"all_to_all"},
            features=FEATURES - {"targets"},
        )

    def shapes(self, options: ResolvedOptions, model: ModelSpec) -> ShapePolicy:  # noqa: ARG002
        """See Plugin.shapes."""
        policy = BatchPolicy(
            mixed=False,
            max_prefills=1,
            max_rows=options.max_batch_rows,
            max_tokens=options.max_batch_tokens,
            max_context=options.max_context,
        )
        variants = (frozenset[str](), FEATURES - {"targets"})
        size = options.block_size
        return FiniteShapes(policy, size, variants, list(prompt_buckets(policy, size)))

    def create(self, launch: Launch) -> Backend:
        """See Plugin.create."""
        from .backend import SimBackend

        return SimBackend(launch, in_place=False)


@hookimpl
def backend_plugin() -> Plugin:
    """The plugin of the entry point `sim-neuron`."""
    return SimNeuronPlugin()
