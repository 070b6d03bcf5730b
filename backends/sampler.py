"""Drawing tokens, on the device and over the whole batch."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from .kv_cache import Cache
from .step import StepInputs, StepOutput


class Sampler(ABC):
    """Order (TGI's): watermark, repetition, frequency, presence, bias, bitmask, temperature, top_k, top_p, typical_p,
    min_p, then argmax of logits + Gumbel noise. Every rank draws from the whole vocabulary and gets equal ids.

    Noise is counter-based, equal (up to rounding of the logarithms) on every backend and in every batch. With mix =
    murmur3's 32-bit finaliser (shifts 16, 13, 16; constants 0x85ebca6b, 0xc2b2ae35):
        key  = mix(mix(mix(seed_low) ^ seed_high) ^ position)
        bits = mix(key ^ mix(token_id + 1)) & 0x7fffff;  u = (bits + 0.5) / 2**23;  noise = -log(-log(u))
    in int32 without unsigned types: to shift a negative right, clear the sign bit, shift, put it back.
    """

    @abstractmethod
    def feed(self, inputs: StepInputs, cache: Cache) -> Tensor:
        """Token ids [T], with last drawn ids where token_slot asks for them. First thing in the model."""

    @abstractmethod
    def __call__(
        self, logits: Tensor, inputs: StepInputs, cache: Cache
    ) -> tuple[StepOutput, Cache]:
        """logits [L, V] f32."""
