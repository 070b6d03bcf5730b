"""The parent half of sim-gaudi. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...backends.capabilities import Capabilities
from ...backends.hookspecs import hookimpl
from ...backends.options import ModelSpec, ResolvedOptions
from ...backends.plugin import API_VERSION, Launch, Plugin, PluginInfo, Probe
from ...backends.shapes import BatchPolicy, ShapePolicy
from .plugin import ATTENTION, COLLECTIVES, DTYPES, FEATURES, SimPlugin
from .shapes import FiniteShapes, rows_buckets

if TYPE_CHECKING:
    from ...backends.backend import Backend


class SimGaudiPlugin(SimPlugin):
    """Gaudi's rules: no mixing, rows layout, lists of the blocks in use, finite buckets."""

    info = PluginInfo(
        name="sim-gaudi",
        api_version=API_VERSION,
        distribution="chipset",
        summary="Gaudi's rules, simulated: no mixing, rows layout, lists of blocks; tests the engine, no kernels",
    )

    def capabilities(self, probe: Probe) -> Capabilities:  # noqa: ARG002 - all are alike
        """See Plugin.capabilities."""
        return Capabilities(
            device_type="sim",
            graphs="compile",
            dtypes=DTYPES,
            kv_dtypes=DTYPES | {"auto", "float8_e4m3fn"},
            fp8_max=240.0,
            block_sizes=(128, 64),
            kv_budget="predict",
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
            mixed=False,
            max_prefills=2,
            token_layout="rows",
            max_rows=options.max_batch_rows,
            max_tokens=options.max_batch_tokens,
            max_context=options.max_context,
        )
        variants = (frozenset[str](), frozenset(("sampled",)), FEATURES)
        size = options.block_size
        return FiniteShapes(policy, size, variants, list(rows_buckets(policy, size)))

    def create(self, launch: Launch) -> Backend:
        """See Plugin.create."""
        from .backend import SimBackend

        return SimBackend(launch)


@hookimpl
def backend_plugin() -> Plugin:
    """The plugin of the entry point `sim-gaudi`."""
    return SimGaudiPlugin()
