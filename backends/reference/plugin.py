"""A whole parent half for torch on the host: where a plugin starts from. Imports no torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..capabilities import Capabilities
from ..options import EngineOptions, ModelSpec, ResolvedOptions
from ..plugin import Launch, Plugin, Probe
from ..shapes import BatchPolicy, DynamicShapes, ShapePolicy
from .resolve import Defaults, resolve

if TYPE_CHECKING:
    from ..backend import Backend


class ReferencePlugin(Plugin):
    """Serves what the references serve, and is never chosen by `auto`. A subclass gives `info` and what differs."""

    def probe(self) -> Probe:
        """A device for each core."""
        devices = os.cpu_count() or 1
        reason = "plain torch runs everywhere"
        return Probe(available=True, num_devices=devices, reason=reason, simulated=True)

    def capabilities(self, probe: Probe) -> Capabilities:  # noqa: ARG002 - the same everywhere
        """See Plugin.capabilities."""
        return Capabilities(
            device_type="cpu",
            dtypes=frozenset({"float32", "bfloat16"}),
            block_sizes=(32, 16, 64),
            kv_budget="predict",
            chunked_prefill=True,
            prefix_cache=True,
            preemption=True,
            attention=frozenset({"window", "soft_cap", "sinks", "alibi"}),
            features=frozenset(
                ("sampled", "filters", "penalties", "bias", "bitmask", "targets", "logprobs")
            ),
        )

    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        """See Plugin.resolve."""
        return resolve(options, model, capabilities, Defaults(backend=self.info.name))

    def shapes(self, options: ResolvedOptions, model: ModelSpec) -> ShapePolicy:  # noqa: ARG002
        """Exact sizes."""
        policy = BatchPolicy(
            max_rows=options.max_batch_rows,
            max_tokens=options.max_batch_tokens,
            max_context=options.max_context,
        )
        return DynamicShapes(policy, options.block_size)

    def create(self, launch: Launch) -> Backend:
        """See Plugin.create."""
        from .backend import ReferenceBackend

        return ReferenceBackend(launch)
