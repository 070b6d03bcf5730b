"""The parent half that the simulators share. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from ...backends.capabilities import Capabilities
from ...backends.options import EngineOptions, ModelSpec, ParallelOptions, ResolvedOptions
from ...backends.plugin import Plugin, Probe, WorkerSpec
from ...backends.reference.native import cache_folder
from ...backends.reference.resolve import Default, Defaults, resolve
from ...backends.reference.workers import sharing_hosts

FEATURES = frozenset(("sampled", "filters", "penalties", "bias", "bitmask", "targets", "logprobs"))
ATTENTION = frozenset(("window", "soft_cap", "sinks", "alibi"))
DTYPES = frozenset(("float32", "bfloat16"))
COLLECTIVES = frozenset(
    ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_receive")
)
NUM_DEVICES = 8
"""Emulated ones of a host."""
NO_COMPILER = "the emulated device is built with g++, which is missing; install it (Debian: apt-get install g++)"


class SimPlugin(Plugin):
    """A test backend: one vendor's rules on an emulated device. It proves the engine, never the vendor's kernels."""

    max_batch_tokens = 256
    max_context = 512
    """Where the user asks for none."""

    def probe(self) -> Probe:
        """Wants a C++ compiler, or the library that one built before."""
        can_load = shutil.which("g++") is not None or any(cache_folder().glob("build/*/device.so"))
        return Probe(
            available=can_load,
            num_devices=NUM_DEVICES,
            reason="simulated on the CPU" if can_load else NO_COMPILER,
            architecture=self.info.name,
            simulated=True,
        )

    def worker_plan(
        self, parallel: ParallelOptions, hosts: Sequence[Probe]
    ) -> Sequence[WorkerSpec]:
        """See Plugin.worker_plan."""
        return sharing_hosts(super().worker_plan(parallel, hosts), os.cpu_count() or 1)

    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        """See Plugin.resolve."""
        simulated = "simulated on the CPU: small, so that tests are quick"
        return resolve(
            options,
            model,
            capabilities,
            Defaults(
                backend=self.info.name,
                dtype=Default(value="float32", reason="texts are compared token by token"),
                block_size="the vendor's",
                max_batch_tokens=Default(value=self.max_batch_tokens, reason=simulated),
                max_batch_rows=Default(value=16, reason=simulated),
                max_logprobs=Default(value=20, reason="what OpenAI's API allows"),
                max_logit_bias=Default(value=64, reason="a padded array a row: every entry costs"),
                memory_utilisation="share of the emulated device's memory",
                graph_memory=Default(
                    value=min(options.graph_memory, 0.1), reason="static buffers of captured graphs"
                )
                if capabilities.graphs == "capture"
                else Default(value=0.0, reason="graphs here hold no memory"),
                parallel="takes one emulated device unless asked for more",
                max_shards=NUM_DEVICES,
                max_context=Default(value=self.max_context, reason=simulated),
            ),
        )
