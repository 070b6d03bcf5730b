"""The parent half of sim-gpu. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...backends.capabilities import Capabilities
from ...backends.hookspecs import hookimpl
from ...backends.options import ModelSpec, ResolvedOptions
from ...backends.plugin import API_VERSION, Launch, Plugin, PluginInfo, Probe
from ...backends.shapes import BatchPolicy, ShapePolicy
from .plugin import ATTENTION, COLLECTIVES, DTYPES, FEATURES, SimPlugin
from .shapes import CapturedShapes

if TYPE_CHECKING:
    from ...backends.backend import Backend


class SimGPUPlugin(SimPlugin):
    """A GPU's rules: captured graphs for decode steps, whose addresses are captured with them; dynamic prefills."""

    info = PluginInfo(
        name="sim-gpu",
        api_version=API_VERSION,
        distribution="chipset",
        summary="a GPU's rules, simulated: captured graphs, dynamic prefills; tests the engine, no kernels",
    )

    def capabilities(self, probe: Probe) -> Capabilities:  # noqa: ARG002 - all are alike
        """See Plugin.capabilities."""
        return Capabilities(
            device_type="sim",
            graphs="capture",
            dtypes=DTYPES,
            kv_dtypes=DTYPES | {"auto", "float8_e4m3fn", "float8_e5m2", "int8"},
            fp8_max=448.0,
            block_sizes=(16, 32),
            kv_budget="profile",
            chunked_prefill=True,
            prefix_cache=True,
            preemption=True,
            attention=ATTENTION,
            collectives=COLLECTIVES,
            features=FEATURES,
        )

    def shapes(self, options: ResolvedOptions, model: ModelSpec) -> ShapePolicy:  # noqa: ARG002
        """See Plugin.shapes."""
        policy = BatchPolicy(
            max_rows=options.max_batch_rows,
            max_tokens=options.max_batch_tokens,
            max_context=options.max_context,
        )
        variants = (frozenset[str](), frozenset(("sampled",)), FEATURES)
        return CapturedShapes(policy, options.block_size, variants)

    def create(self, launch: Launch) -> Backend:
        """See Plugin.create."""
        from .backend import SimBackend

        return SimBackend(launch, packed=True)


@hookimpl
def backend_plugin() -> Plugin:
    """The plugin of the entry point `sim-gpu`."""
    return SimGPUPlugin()
