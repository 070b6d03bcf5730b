"""The worker half of a plugin: one Backend per worker process, made by Plugin.create.

Model code between contract calls uses reshape, split, index_select, arithmetic and tanh, nothing else of torch; outside
contract members the core performs no operation on device tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from .attention import Attention
from .collectives import Collectives
from .compiler import Compiler
from .kv_cache import KVCache
from .ops import Ops
from .quantization import Linear
from .runtime import Runtime
from .sampler import Sampler
from .step import Prepared, StepBatch


class Backend(ABC):
    """What a worker touches its device through."""

    runtime: Runtime
    kv: KVCache
    attention: Attention
    linear: Linear
    ops: Ops
    comm: Collectives
    compiler: Compiler
    sampler: Sampler

    @abstractmethod
    def prepare(self, batch: StepBatch) -> Prepared:
        """All device inputs of a step in at most one copy per dtype. Never pads, never waits for a step."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Leave process groups and free the device."""
