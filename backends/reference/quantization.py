"""Linear layers with plain weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantization import EmbeddingSpec, Linear, LinearSpec, Verdict
from ..runtime import Runtime
from .dtypes import torch_dtype
from .ops import activate


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


class PlainExperts(nn.Module):
    """Every expert on every token, weighted by 0 where it was not chosen: shapes stay those of the bucket."""

    gate_up: Tensor
    """[E, 2 * I, H], the gate first"""
    down: Tensor
    """[E, H, I]"""
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor], activation: str
    ) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("gate_up", gate_up["weight"])
        self.register_buffer("down", down["weight"])
        self.register_buffer("gate_up_bias", gate_up.get("bias"))
        self.register_buffer("down_bias", down.get("bias"))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See Linear.build_experts; the sum over experts is in float32."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in range(self.down.shape[0]):
            share = torch.where(ids == expert, weights, 0.0).sum(-1, keepdim=True)
            total = total + share * self.expert(expert, x).float()
        return total.to(x.dtype)

    def expert(self, index: int, x: Tensor) -> Tensor:
        """x [T, H] through one expert: [T, H]."""
        bias = None if self.gate_up_bias is None else self.gate_up_bias[index]
        gate, up = self.linear(x, self.gate_up[index], bias).chunk(2, -1)
        bias = None if self.down_bias is None else self.down_bias[index]
        return self.linear(activate(gate, self.activation) * up, self.down[index], bias)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] -> [T, N] of x's dtype."""
        return F.linear(x, weight, bias)


class ReferenceLinear(Linear):
    """Plain weights only: the core dequantises the rest at load."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def kernels(self, spec: LinearSpec) -> Sequence[Verdict]:
        """One kernel."""
        kind = spec.weight.kind
        if kind == "plain":
            return (Verdict(kernel="torch", ok=True, reason="plain weight"),)
        return (Verdict(kernel="torch", ok=False, reason=f"no kernel for {kind} weights"),)

    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        """See Linear.build."""
        held = self._put(tensors)
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
        gate_up: LinearSpec,  # noqa: ARG002 - the tensors say it all
        down: LinearSpec,  # noqa: ARG002
        tensors: Mapping[str, Mapping[str, Tensor]],
        activation: str,
    ) -> nn.Module:
        """See Linear.build_experts."""
        return PlainExperts(self._put(tensors["gate_up"]), self._put(tensors["down"]), activation)

    def _put(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.runtime.put(tensor) for name, tensor in tensors.items()}
