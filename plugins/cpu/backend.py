"""The worker half: the torch references, and what is faster here in their place."""

from __future__ import annotations

from ...backends.backend import Backend
from ...backends.plugin import Launch
from ...backends.reference.attention import ReferenceAttention, attention_arrays
from ...backends.reference.collectives import SingleRank
from ...backends.reference.compiler import EagerCompiler
from ...backends.reference.kv_cache import ReferenceKVCache
from ...backends.reference.ops import ReferenceOps
from ...backends.reference.quantization import ReferenceLinear
from ...backends.reference.runtime import HostRuntime
from ...backends.reference.sampler import ReferenceSampler
from ...backends.reference.staging import Staged, stage
from ...backends.step import StepBatch


class CPUBackend(Backend):
    """One process on all the cores it may use."""

    def __init__(self, launch: Launch) -> None:
        self.block_size = launch.options.block_size
        self.runtime = HostRuntime()
        self.kv = ReferenceKVCache(self.runtime, launch)
        self.attention = ReferenceAttention()
        self.linear = ReferenceLinear(self.runtime)
        self.ops = ReferenceOps()
        self.comm = SingleRank()
        self.compiler = EagerCompiler()
        self.sampler = ReferenceSampler(launch.options.max_logprobs)

    def prepare(self, batch: StepBatch) -> Staged:
        """See Backend.prepare."""
        return stage(batch, attention_arrays(batch, self.block_size), self.runtime.put)
