"""Linear layers and the formats their weights may have: verdicts first, then modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormat:
    """Canonical packed form of a weight; parsed from the checkpoint's format once, in the core."""

    kind: Literal["plain", "int4", "int8", "fp8", "mxfp4", "nf4", "blocks"] = "plain"
    """How numbers are packed; "plain" is the dtype of the spec."""
    group_size: int | None = None
    """Along in_features; None = whole row."""
    block: tuple[int, int] | None = None
    """2-D scale blocks (fp8 128 x 128)."""
    zero_points: bool = False
    """There is a tensor "zero_point" beside "scale"."""
    permuted: bool = False
    """GPTQ's desc_act: tensor "order" i32 [in_features]."""
    activation: Literal["none", "dynamic_token", "static_tensor"] = "none"
    """Quantised input."""
    blocks: str = ""
    """kind "blocks": the ggml type's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """A linear layer as this rank holds it: the core has cut the tensors.

    Under SPMD nothing is cut and `shard` says how each part may be.
    """

    name: str
    """"layers.3.attention.qkv"."""
    in_features: int
    """K of this rank."""
    out_features: int
    """N of this rank, the sum of `parts`."""
    parts: tuple[int, ...]
    """Outputs side by side, e.g. (q, k, v); one part is (out_features,)."""
    bias: bool = False
    """A row-parallel one is zero except on the first rank."""
    dtype: str
    """Of the input."""
    out_dtype: str
    """Of the output; the head's is float32, and not rounded to a narrower one on the way."""
    weight: WeightFormat = field(default_factory=WeightFormat)
    """Format of the tensors that build gets."""
    shard: Literal["none", "out", "in"] = "none"
    """Under SPMD: which axis may be cut."""
    num_experts: int = 0
    """> 0: tensors have a leading [E] axis."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingSpec:
    """The vocabulary rows this rank holds."""

    first_row: int
    """0, and all rows, without tensor parallelism."""
    num_rows: int
    """Of the vocabulary, on this rank."""
    hidden_size: int
    """H"""
    dtype: str
    """Of the rows given out."""
    shard: Literal["none", "out"] = "none"
    """Under SPMD: whether rows may be cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a kernel takes a layer, and why."""

    kernel: str
    """Its name, the plugin's own."""
    ok: bool
    """Whether it takes the layer."""
    reason: str
    """Always filled."""


class Linear(ABC):
    """Builds modules that hold their weights as buffers, so that a compiler can find, lift and donate them."""

    @abstractmethod
    def kernels(self, spec: LinearSpec) -> Sequence[Verdict]:
        """Best first. None ok: the core dequantises at load and says so."""

    @abstractmethod
    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        """x [T, in_features] -> a tuple, one [T, n] for each part (fused or not is the plugin's choice).

        `tensors` are canonical and on the host: weight [N, K] (packed along K), scale, zero_point, order, bias [N].
        """

    @abstractmethod
    def build_embedding(
        self, spec: EmbeddingSpec, weight: Tensor, tied_head: LinearSpec | None
    ) -> tuple[nn.Module, nn.Module | None]:
        """The embedding, and the head that shares its weight, which is held once.

        ids [T] -> [T, H], zeros where the id is another rank's (the core reduces).
        """

    @abstractmethod
    def build_experts(
        self,
        gate_up: LinearSpec,
        down: LinearSpec,
        tensors: Mapping[str, Mapping[str, Tensor]],
        activation: str,
    ) -> nn.Module:
        """x [T, H], weights f32 [T, k], ids i32 [T, k] -> [T, H].

        `tensors` has the keys gate_up and down, each with weight [E, N, K].
        """
