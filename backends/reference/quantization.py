"""Linear layers with plain weights, and the builder of all the reference has."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantization import EmbeddingSpec, Linear, LinearSpec, Verdict
from ..runtime import Runtime
from .dtypes import torch_dtype
from .experts import PlainExperts
from .packed import KINDS, PackedExperts, PackedLinear


class PlainLinear(nn.Module):
    """x [T, K] -> one [T, n] for each part. Where the output is wider than the input, so is the product."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, spec: LinearSpec, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.parts = list(spec.parts)
        self.out_dtype = torch_dtype(spec.out_dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """See Linear.build."""
        weight, bias = self.weight, self.bias
        if self.out_dtype.itemsize > weight.dtype.itemsize:
            x, weight = x.to(self.out_dtype), weight.to(self.out_dtype)
            bias = None if bias is None else bias.to(self.out_dtype)
        return torch.split(F.linear(x, weight, bias).to(self.out_dtype), self.parts, -1)


class PlainEmbedding(nn.Module):
    """ids [T] -> [T, H], zeros where the row is another rank's."""

    weight: Tensor

    def __init__(self, spec: EmbeddingSpec, weight: Tensor) -> None:
        super().__init__()
        self.first_row, self.num_rows = spec.first_row, spec.num_rows
        self.register_buffer("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        """See Linear.build_embedding."""
        row = ids - self.first_row
        mine = (row >= 0) & (row < self.num_rows)
        found = self.weight.index_select(0, row.clamp(0, self.num_rows - 1))
        return torch.where(mine[:, None], found, 0.0)


class ReferenceLinear(Linear):
    """Plain weights, and of the packed kinds those it is told to take: the core dequantises the rest at load."""

    def __init__(self, runtime: Runtime, kinds: Collection[str] = frozenset({"plain"})) -> None:
        self.runtime = runtime
        self.kinds = frozenset(kinds) & (KINDS | {"plain"})

    def kernels(self, spec: LinearSpec) -> Sequence[Verdict]:
        """One kernel."""
        kind = spec.weight.kind
        if kind not in self.kinds:
            return (Verdict(kernel="torch", ok=False, reason=f"no kernel for {kind} weights"),)
        reason = "plain weight" if kind == "plain" else f"{kind} is unpacked in every step"
        return (Verdict(kernel="torch", ok=True, reason=reason),)

    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        """See Linear.build."""
        held = self._put(tensors)
        if spec.weight.kind != "plain":
            return PackedLinear(spec, held)
        return PlainLinear(spec, held["weight"], held.get("bias"))

    def build_embedding(
        self, spec: EmbeddingSpec, weight: Tensor, tied_head: LinearSpec | None
    ) -> tuple[nn.Module, nn.Module | None]:
        """See Linear.build_embedding."""
        held = self.runtime.put(weight)
        head = None if tied_head is None else PlainLinear(tied_head, held, None)
        return PlainEmbedding(spec, held), head

    def build_experts(
        self,
        gate_up: LinearSpec,
        down: LinearSpec,
        tensors: Mapping[str, Mapping[str, Tensor]],
        activation: str,
    ) -> nn.Module:
        """See Linear.build_experts."""
        held = {name: self._put(of) for name, of in tensors.items()}
        if gate_up.weight.kind == down.weight.kind == "plain":
            return PlainExperts(held["gate_up"], held["down"], activation)
        return PackedExperts(gate_up, down, held, activation)

    def _put(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.runtime.put(tensor) for name, tensor in tensors.items()}
