"""Small operations of a model.

Torch references for all are in reference/; a backend overrides what it has better.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Ops(ABC):
    """Pure functions of their arguments; T is the tokens of the step, H the hidden size."""

    @abstractmethod
    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        *,
        offset: float = 0.0,
        weight_in_float: bool = False,
    ) -> Tensor:
        """x [..., H], weight [H]: in float32, times (offset + weight).

        The product is rounded to x's dtype before (Llama) or after (Gemma) the weight.
        """

    @abstractmethod
    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        *,
        offset: float = 0.0,
        weight_in_float: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual)."""

    @abstractmethod
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """x [..., H]."""

    @abstractmethod
    def rope(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        """q [T, Hq, D], k [T, Hkv, D], cos and sin f32 [T, D' / 2]: the first D' <= D are rotated, in float32."""

    @abstractmethod
    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """activation(gate) * up, [T, I]. activation: silu, gelu, gelu_tanh, relu."""

    @abstractmethod
    def activation(self, x: Tensor, activation: str) -> Tensor:
        """activation(x): silu, gelu, gelu_tanh, relu."""

    @abstractmethod
    def route(self, logits: Tensor, k: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
        """Softmax, then the k best experts: [T, E] -> weights f32 [T, k], ids i32 [T, k]."""
