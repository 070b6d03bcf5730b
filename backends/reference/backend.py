"""A whole worker half in plain torch on the host: where a plugin starts from, to replace what its device has better."""

from __future__ import annotations

from typing import ClassVar

from ..backend import Backend
from ..plugin import Launch
from ..step import StepBatch
from .attention import ReferenceAttention, attention_arrays
from .collectives import GlooCollectives, RankCollectives, SingleRank
from .compiler import EagerCompiler
from .kv_cache import ReferenceKVCache
from .operators import OperatorCollectives
from .ops import ReferenceOps
from .quantization import ReferenceLinear
from .runtime import HostRuntime
from .sampler import ReferenceSampler
from .staging import Staged, stage
from .telemetry import Counters


class ReferenceBackend(Backend):
    """Every member is the reference; a subclass sets its own after super().__init__(launch)."""

    collectives: ClassVar[type[OperatorCollectives]] = OperatorCollectives
    """Of `comm`, where there are several ranks, over gloo: they meet in super().__init__."""
    comm: RankCollectives
    telemetry: Counters

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.runtime = HostRuntime()
        self.kv = ReferenceKVCache(self.runtime, launch)
        self.attention = ReferenceAttention()
        self.linear = ReferenceLinear(self.runtime)
        self.ops = ReferenceOps()
        alone = launch.world_size == 1
        self.comm = SingleRank() if alone else self.collectives(GlooCollectives(launch))
        self.compiler = EagerCompiler()
        self.sampler = ReferenceSampler(launch.options.max_logprobs)
        self.telemetry = Counters()

    def prepare(self, batch: StepBatch) -> Staged:
        """See Backend.prepare."""
        layout = self.launch.shapes.batch.token_layout
        arrays = attention_arrays(batch, self.launch.options.block_size, layout)
        return stage(batch, arrays, self.runtime.put)

    def close(self) -> None:
        """See Backend.close."""
        self.comm.close()
