"""Linear layers and the formats their weights may have: verdicts first, then modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormat:
    """Canonical packed form of a weight [N, K]; the core makes it of every checkpoint format, once.

    kind     tensor "weight"                                  a number is
    plain    [N, K] of the spec's dtype                       itself
    int4     u8 [N, K / 2], even columns in the low half      scale * (q - zero_point), q from 0 to 15
    int8     i8 [N, K]                                        scale * (q - zero_point), q from -128 to 127
    fp8      float8_e4m3fn [N, K]                             scale * q

    Beside it, on the host as well, and with the leading [E] of experts where there are any:
    scale         f32 [N, K / group_size], [N, 1] without groups, or [ceil(N / block[0]), ceil(K / block[1])]
    zero_point    f32, of scale's shape, where zero_points is not "none"; else 8 for int4, 0 for int8
    order         i32 [K] where `permuted`
    input_scale   f32 [] where activation is "static_tensor"
    """

    kind: str = "plain"
    """One of the table, or what a CheckpointFormat of the same plugin brings."""
    group_size: int | None = None
    """Columns that share a scale; None: a whole row, or `block`."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale (fp8: 128, 128)."""
    zero_points: Literal["none", "whole", "real"] = "none"
    """whole: whole numbers (AWQ, GPTQ); real: any (ggml's formats with a minimum)."""
    permuted: bool = False
    """GPTQ's desc_act. Column k of the weight multiplies x[:, order[k]], or 0 where order[k] is in_features: groups of
    which a rank holds parts are padded to one size, so that there may be more columns than in_features."""
    activation: Literal["none", "dynamic_token", "static_tensor"] = "none"
    """How the checkpoint means the input to be quantised: not, or to the weight's kind with a scale found for each
    token, or with input_scale. A kernel may compute with an input that is more precise."""


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

        `tensors` are canonical (see WeightFormat) and on the host, and bias [N] of the spec's dtype beside them. Called
        for a spec that a kernel takes. Re-scaling for Capabilities.fp8_max is done here. Whatever is repacked is held
        once: the module's buffers are all that stays.
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

        `tensors` has the keys gate_up and down, each with canonical tensors of leading [E]; gate_up's parts are (I, I).
        The output of each rank is its share of a sum (the core reduces). Called for specs that a kernel takes.
        """
