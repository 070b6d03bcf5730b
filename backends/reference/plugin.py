"""A whole parent half for torch on the host: where a plugin starts from. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ..capabilities import Capabilities
from ..options import EngineOptions, ModelSpec, ParallelOptions, ResolvedOptions
from ..plugin import Launch, Plugin, Probe, WorkerSpec
from ..shapes import BatchPolicy, DynamicShapes, ShapePolicy
from .resolve import Default, Defaults, resolve
from .workers import sharing_hosts, spread

if TYPE_CHECKING:
    from ..backend import Backend


class ReferencePlugin(Plugin):
    """Serves what the references serve, and is never chosen by `auto`. A subclass gives `info` and what differs."""

    max_ranks: ClassVar[int] = 8
    """Processes a host."""
    max_context: ClassVar[int] = 1024
    """Tokens of a text where the user asks for none: every step reads whole tables."""

    def probe(self) -> Probe:
        """The host."""
        reason = "plain torch runs everywhere"
        return Probe(available=True, num_devices=1, reason=reason, simulated=True)

    def capabilities(self, probe: Probe) -> Capabilities:  # noqa: ARG002 - the same everywhere
        """See Plugin.capabilities."""
        return Capabilities(
            device_type="cpu",
            dtypes=frozenset({"float32", "bfloat16"}),
            kv_dtypes=frozenset(
                ("auto", "float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
            ),
            block_sizes=(32, 16, 64),
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
        """Processes that share the cores of their host."""
        plan = spread(parallel.tensor * parallel.pipeline, len(hosts), self.max_ranks)
        return sharing_hosts(plan, os.cpu_count() or 1)

    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        """See Plugin.resolve."""
        short = "plain torch reads whole tables in every step"
        defaults = Defaults(
            backend=self.info.name,
            max_shards=self.max_ranks,
            max_context=Default(value=self.max_context, reason=short),
        )
        return resolve(options, model, capabilities, defaults)

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
