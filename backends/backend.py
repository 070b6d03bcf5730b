"""The worker half of a plugin: one Backend for each model of a worker process, made by Plugin.create.

Model code between contract calls uses reshape, split, index_select, arithmetic and tanh, nothing else of torch; outside
contract members the core performs no operation on device tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from .attention import Attention
from .collectives import Collectives
from .compiler import Compiler
from .errors import PluginError
from .kv_cache import KVCache
from .ops import Ops
from .quantization import Linear
from .runtime import Runtime
from .sampler import Sampler
from .step import Prepared, StepBatch
from .telemetry import Telemetry

MEMBERS: tuple[tuple[str, type], ...] = (
    ("runtime", Runtime),
    ("kv", KVCache),
    ("attention", Attention),
    ("linear", Linear),
    ("ops", Ops),
    ("comm", Collectives),
    ("compiler", Compiler),
    ("sampler", Sampler),
    ("telemetry", Telemetry),
)
"""What a Backend must have, and of which class."""


class Backend(ABC):
    """What a worker touches its device through."""

    runtime: Runtime
    """Memory, copies, the wait."""
    kv: KVCache
    """Blocks and request slots."""
    attention: Attention
    """Over the cache."""
    linear: Linear
    """Projections, embeddings, experts."""
    ops: Ops
    """Norms, rotary embeddings, activations, routing."""
    comm: Collectives
    """Between ranks."""
    compiler: Compiler
    """From modules to graphs."""
    sampler: Sampler
    """From logits to ids."""
    telemetry: Telemetry = Telemetry()
    """Ranges and counters."""

    @abstractmethod
    def prepare(self, batch: StepBatch) -> Prepared:
        """All device inputs of a step in at most one copy per dtype.

        Never pads, never waits for a step, runs no operation on the device and casts no bits there.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Leave process groups and free the device."""


def check_members(backend: Backend) -> None:
    """Raises PluginError, naming the member of MEMBERS that is missing or of another class."""
    for name, base in MEMBERS:
        member = getattr(backend, name, None)
        if not isinstance(member, base):
            what = "is missing" if member is None else f"is a {type(member).__name__}"
            raise PluginError(
                f"{type(backend).__name__}.{name} {what}; the contract wants a {base.__name__}"
            )
