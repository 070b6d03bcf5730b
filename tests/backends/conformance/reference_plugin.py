"""A plugin that is nothing but backends/reference/ on torch's CPU, each part of which a mutation may replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from chipset.backends.backend import Backend
from chipset.backends.capabilities import Capabilities
from chipset.backends.compiler import Compiler
from chipset.backends.options import EngineOptions, ModelSpec, ResolvedOptions
from chipset.backends.plugin import API_VERSION, Launch, Plugin, PluginInfo, Probe
from chipset.backends.reference.attention import ReferenceAttention, attention_arrays
from chipset.backends.reference.collectives import RankCollectives, join
from chipset.backends.reference.compiler import EagerCompiler
from chipset.backends.reference.kv_cache import ReferenceKVCache
from chipset.backends.reference.ops import ReferenceOps
from chipset.backends.reference.packed import KINDS
from chipset.backends.reference.quantization import ReferenceLinear
from chipset.backends.reference.resolve import Default, Defaults, resolve
from chipset.backends.reference.runtime import HostRuntime
from chipset.backends.reference.sampler import ReferenceSampler
from chipset.backends.reference.staging import Staged, stage
from chipset.backends.shapes import BatchPolicy, DynamicShapes, ShapePolicy
from chipset.backends.step import F32, I32, StepBatch

from .bucketed import BucketedShapes, CountingCompiler

ALL_KINDS = KINDS | {"plain"}
"""Of weights."""
BUDGET = 2**26
"""Bytes for KV blocks, whatever the machine."""
NUM_DEVICES = 4
CAPABILITIES = Capabilities(
    device_type="cpu",
    graphs="compile",
    dtypes=frozenset({"float32", "bfloat16"}),
    kv_dtypes=frozenset(("auto", "float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")),
    block_sizes=(16, 8),
    kv_budget="predict",
    chunked_prefill=True,
    prefix_cache=True,
    preemption=True,
    overlapped_steps=True,
    attention=frozenset({"window", "soft_cap", "sinks", "alibi"}),
    features=frozenset(
        ("sampled", "filters", "penalties", "bias", "bitmask", "targets", "logprobs")
    ),
    collectives=frozenset(
        ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_receive")
    ),
)
DEFAULTS = Defaults(
    backend="reference",
    dtype=Default(value="float32", reason="what the references are exact in"),
    block_size="some blocks a text",
    max_batch_tokens=Default(value=128, reason="some chunks a prompt"),
    max_batch_rows=Default(value=8, reason="enough to share a step"),
    max_logprobs=Default(value=20, reason="what OpenAI's API allows"),
    max_logit_bias=Default(value=8, reason="a few"),
    memory_utilisation="share of a fixed budget",
    graph_memory=Default(value=0.0, reason="no graph takes any"),
    parallel="runs a process a shard",
    max_shards=NUM_DEVICES,
)


class FixedKVCache(ReferenceKVCache):
    """With a budget that is a function of the options alone."""

    def budget(self, utilisation: float, largest_step: Callable[[], None] | None) -> int:
        """See KVCache.budget."""
        return int(utilisation * BUDGET) - self.slot_bytes


def bucketed(options: ResolvedOptions, capabilities: Capabilities) -> ShapePolicy:
    """Finite shapes."""
    return BucketedShapes(
        _policy(options),
        options.block_size,
        capabilities.features,
        max_context=options.max_context,
    )


def dynamic(options: ResolvedOptions, capabilities: Capabilities) -> ShapePolicy:
    """Exact shapes."""
    return DynamicShapes(_policy(options), options.block_size)


def _policy(options: ResolvedOptions) -> BatchPolicy:
    return BatchPolicy(
        max_rows=options.max_batch_rows,
        max_tokens=options.max_batch_tokens,
        max_context=options.max_context,
    )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a reference plugin is made of; a mutation replaces one."""

    backend: type[ReferenceBackend]
    runtime: Callable[[], HostRuntime] = HostRuntime
    kv: Callable[..., ReferenceKVCache] = FixedKVCache
    """(runtime, launch, in_place=...)"""
    attention: Callable[..., ReferenceAttention] = ReferenceAttention
    """(in_place=...)"""
    arrays: Callable[[StepBatch, int], Mapping[str, I32 | F32]] = attention_arrays
    """(batch, block size): what the attention reads beside q, k and v."""
    linear: Callable[[Any], ReferenceLinear] = lambda runtime: ReferenceLinear(runtime, ALL_KINDS)
    """(runtime)"""
    ops: Callable[[], ReferenceOps] = ReferenceOps
    collectives: Callable[[Launch], RankCollectives] = join
    compiler: Callable[[], Compiler] = CountingCompiler
    sampler: Callable[..., ReferenceSampler] = ReferenceSampler
    """(max_logprobs, in_place=...)"""
    shapes: Callable[[ResolvedOptions, Capabilities], ShapePolicy] = bucketed
    capabilities: Capabilities = field(default_factory=lambda: CAPABILITIES)
    in_place: bool = True


class ReferenceBackend(Backend):
    """The worker half."""

    def __init__(self, launch: Launch, parts: Parts) -> None:
        self.parts = parts
        self.block_size = launch.options.block_size
        self.runtime = parts.runtime()
        self.kv = parts.kv(self.runtime, launch, in_place=parts.in_place)
        self.attention = parts.attention(in_place=parts.in_place)
        self.linear = parts.linear(self.runtime)
        self.ops = parts.ops()
        self.comm: RankCollectives = parts.collectives(launch)
        self.compiler = parts.compiler()
        self.sampler = parts.sampler(launch.options.max_logprobs, in_place=parts.in_place)

    def prepare(self, batch: StepBatch) -> Staged:
        """See Backend.prepare."""
        return stage(batch, self.parts.arrays(batch, self.block_size), self.runtime.put)

    def close(self) -> None:
        """See Backend.close."""
        self.comm.close()


class ReferencePlugin(Plugin):
    """`ReferencePlugin()` is whole; `ReferencePlugin(sampler=Broken)` has one part replaced (see Parts)."""

    info = PluginInfo(
        name="reference",
        api_version=API_VERSION,
        distribution="chipset",
        summary="the torch references, for tests of the conformance kit",
    )

    def __init__(self, **parts: Any) -> None:
        self.parts = replace(Parts(backend=ReferenceBackend), **parts)

    def probe(self) -> Probe:
        """See Plugin.probe."""
        return Probe(
            available=True, num_devices=NUM_DEVICES, reason="made by a test", simulated=True
        )

    def capabilities(self, probe: Probe) -> Capabilities:
        """See Plugin.capabilities."""
        return self.parts.capabilities

    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        """See Plugin.resolve."""
        return resolve(options, model, capabilities, DEFAULTS)

    def shapes(self, options: ResolvedOptions, model: ModelSpec) -> ShapePolicy:
        """See Plugin.shapes."""
        return self.parts.shapes(options, self.parts.capabilities)

    def create(self, launch: Launch) -> Backend:
        """See Plugin.create."""
        return self.parts.backend(launch, self.parts)


class DynamicPlugin(ReferencePlugin):
    """With exact shapes, and a cache that is given away and returned anew."""

    def __init__(self, **parts: Any) -> None:
        capabilities = replace(CAPABILITIES, graphs="none")
        mine = {"shapes": dynamic, "compiler": EagerCompiler, "capabilities": capabilities}
        super().__init__(**{**mine, "in_place": False, **parts})
