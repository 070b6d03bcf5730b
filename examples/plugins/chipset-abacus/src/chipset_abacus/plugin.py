"""The parent half: what the backend is, can do and brings. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from chipset.backends.capabilities import Capabilities
from chipset.backends.formats import CheckpointFormat, Scheme
from chipset.backends.hookspecs import hookimpl
from chipset.backends.options import ModelSpec, ResolvedOptions
from chipset.backends.plugin import API_VERSION, Launch, Plugin, PluginInfo, Probe
from chipset.backends.reference.plugin import ReferencePlugin
from chipset.backends.reference.shapes import FiniteShapes, sizes
from chipset.backends.shapes import BatchPolicy, Bucket, Phase

if TYPE_CHECKING:
    from chipset.backends.backend import Backend

FEATURES = frozenset({"sampled", "filters", "penalties", "bias", "logprobs"})


class AbacusPlugin(ReferencePlugin):
    """Torch on the CPU, with attention, a weight format, a sum over ranks and shapes of its own."""

    info = PluginInfo(name="abacus", api_version=API_VERSION, distribution="chipset-abacus", summary="counts on beads")

    def capabilities(self, probe: Probe) -> Capabilities:
        """See Plugin.capabilities."""
        return replace(super().capabilities(probe), attention=frozenset({"window"}), features=FEATURES)

    def shapes(self, options: ResolvedOptions, model: ModelSpec) -> FiniteShapes:
        """A prompt or a chunk of one alone, or decoding rows together; all sizes grow fourfold, so there are few."""
        most, tokens, context = options.max_batch_rows, options.max_batch_tokens, options.max_context
        policy = BatchPolicy(mixed=False, max_prefills=1, max_rows=most, max_tokens=tokens, max_context=context)
        widths = sizes(4, -(-context // options.block_size), 4)
        steps = [(Phase.PREFILL, 1, q) for q in sizes(8, tokens, 4)] + [(Phase.DECODE, r, 1) for r in sizes(1, most, 4)]
        buckets = [
            Bucket(phase=phase, num_rows=r, num_tokens=r * q, num_logits=r, max_query=q, blocks_per_row=width)
            for phase, r, q in steps
            for width in widths
        ]
        return FiniteShapes(policy, options.block_size, (frozenset(), FEATURES), buckets)

    def create(self, launch: Launch) -> Backend:
        """Torch is imported here, in the worker."""
        from .backend import AbacusBackend

        return AbacusBackend(launch)


class AbacusFormat(CheckpointFormat):
    """In checkpoints whose config.json says so and, by --quantize, of plain ones."""

    name = "abacus"

    def read(self, config: Mapping[str, object] | None) -> Scheme:
        """See CheckpointFormat.read."""
        from .beads import AbacusScheme

        return AbacusScheme(is_stored=config is not None)


@hookimpl
def backend_plugin() -> Plugin:
    """The plugin of the entry point `abacus`."""
    return AbacusPlugin()


@hookimpl
def quantization_formats() -> Sequence[CheckpointFormat]:
    """What --quantize takes with this backend beside chipset's own."""
    return [AbacusFormat()]
