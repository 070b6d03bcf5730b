"""The KV cache on a device: sized, allocated, copied, exported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from .options import KVGroup
from .runtime import Pending
from .step import I32

Cache: TypeAlias = Any
"""Opaque pytree of device tensors: KV of all groups, last ids, token counts."""

IN_PROMPT = 2**30
"""Added to the count of a token that the prompt holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KVPlan:
    """How many blocks a group gets: ids 0 .. num_blocks - 1, of which 0 is null."""

    group: KVGroup
    """One of ModelSpec.groups."""
    num_blocks: int
    """The null block included."""


@dataclass(frozen=True, kw_only=True)
class KVBlob:
    """Blocks in a form that every backend reads: token-major CPU tensors, so block sizes may differ."""

    keys: Tensor
    """[layers, tokens, Hkv, D]"""
    values: Tensor
    """[layers, tokens, Hkv, Dv]"""
    heads: tuple[int, int]
    """First and end of the model's kv heads held."""
    key_scales: Tensor | None = None
    """f32 [layers, tokens, Hkv] where the group's dtype is int8: a key is its numbers times this."""
    value_scales: Tensor | None = None
    """The same of values."""


class KVCache(ABC):
    """Blocks are recycled unclean, and block 0 is nobody's.

    Members that take block ids get them padded with 0 to powers of two up to 64, and whoever uses one calls it once per
    size with all-null arguments before freeze; reset_slot is called with the sink slot, once with zeros and once with
    None. Each is a program of its own, dispatched before it returns: lazy work left over would be compiled with the
    next step, after freeze. A cache given to a member that returns one is given away: the caller rebinds.
    """

    @abstractmethod
    def block_bytes(self, group: KVGroup) -> int:
        """What a block really takes on the device: padding and scales included."""

    @abstractmethod
    def budget(self, utilisation: float, largest_step: Callable[[], None] | None) -> int:
        """Bytes for blocks on this rank's device: weights, slots, a sink of its own and graph memory taken off.

        All ranks call it together, and all run largest_step or, where kv_budget is "predict", none: then, where there
        are graphs, it is a function of options and model alone, since the size is part of every graph. The core takes
        the least over the ranks (or kv_bytes) and divides it among the groups.
        """

    @abstractmethod
    def allocate(self, plans: Sequence[KVPlan]) -> Cache:
        """With max_batch_rows slots and a sink slot. A cache never moves; the core never holds two of one model."""

    def free(self, cache: Cache) -> None:  # noqa: B027 - dropping the reference is enough for most
        """Give back what allocate took; default: when the last reference goes."""

    def usable(self, cache: Cache) -> bool:  # noqa: ARG002
        """After an exception: False where a donated cache is lost.

        The core then frees it, allocates anew and recomputes every row.
        """
        return True

    @abstractmethod
    def copy_blocks(self, cache: Cache, group: int, pairs: I32) -> Cache:
        """pairs [N, 2]: from, to."""

    @abstractmethod
    def export_blocks(self, cache: Cache, group: int, blocks: I32) -> Pending[KVBlob]:
        """The tokens of `blocks` [N], padded ids too (the core cuts them)."""

    @abstractmethod
    def import_blocks(self, cache: Cache, group: int, blocks: I32, blob: KVBlob) -> Cache:
        """Overwrite `blocks` [N] with a blob of exactly N * B tokens."""

    @abstractmethod
    def reset_slot(self, cache: Cache, slot: int, counts: I32 | None) -> Cache:
        """A request takes the slot: set its token counts. Called between steps, before the first with the request.

        counts [V]: times drawn, plus IN_PROMPT where the prompt holds the token (repetition looks at both, frequency
        and presence at the output, which is not empty after preemption); None where it uses no penalties, and what is
        left there has no effect then. The sampler counts only in variants with penalties.
        """
