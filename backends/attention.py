"""Attention over the paged cache: KV write and attention are one call, because devices differ in which comes first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .kv_cache import Cache
from .options import AttentionSpec
from .step import DeviceInputs


@dataclass(frozen=True, kw_only=True)
class AttentionParams:
    """A layer's tensors beside q, k and v."""

    sinks: Tensor | None = None
    """[Hq]"""
    alibi_slopes: Tensor | None = None
    """[Hq]"""
    key_scale: Tensor | None = None
    """Of a float8 cache: f32 [], which keys are divided by as they are written; None: 1."""
    value_scale: Tensor | None = None
    """The same of values."""


class Attention(ABC):
    """Softmax of scaled, capped, biased and masked scores over all tokens of each row."""

    @abstractmethod
    def supports(self, spec: AttentionSpec) -> Sequence[str]:
        """Reasons against; empty when it can. Agrees with Capabilities.attention."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        spec: AttentionSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Cache,
        inputs: DeviceInputs,
        params: AttentionParams,
    ) -> tuple[Tensor, Cache]:
        """Write k, v at the step's slots and attend to all of each row.

        q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv]; `layer` selects the layer's part of the cache.
        Returns [T, Hq, Dv] (finite garbage on padding) and the cache, the same object or a new one. A leaf of the cache
        that the step leaves alone is returned as the same object.

        Keys and values are seen as the cache holds them, those of this step too: what a narrow cache rounds, it rounds
        for every query.

        What lies in the null block, at or past context_len, or left of the window of the row's first query may be nan
        and must reach no row: mask the values too, for 0 * nan is nan. Masks use finfo.min, never -inf.
        """
