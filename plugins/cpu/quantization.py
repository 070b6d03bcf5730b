"""Linear layers on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...backends.quantization import EmbeddingSpec, LinearSpec
from ...backends.reference.quantization import (
    PlainEmbedding,
    PlainExperts,
    PlainLinear,
    ReferenceLinear,
)
from ...backends.runtime import Runtime
from .product import Product


class CPULinear(ReferenceLinear):
    """Plain weights."""

    def __init__(self, runtime: Runtime, product: Product) -> None:
        super().__init__(runtime)
        self.product = product

    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        """See Linear.build."""
        held = self._put(tensors)
        return CPULinearLayer(spec, held["weight"], held.get("bias"), self.product)

    def build_embedding(
        self, spec: EmbeddingSpec, weight: Tensor, tied_head: LinearSpec | None
    ) -> tuple[nn.Module, nn.Module | None]:
        """See Linear.build_embedding."""
        held = self.runtime.put(weight)
        embedding = PlainEmbedding(spec, held)
        if tied_head is None:
            return embedding, None
        return embedding, CPULinearLayer(tied_head, held, None, self.product)

    def build_experts(
        self,
        gate_up: LinearSpec,  # noqa: ARG002 - the tensors say it all
        down: LinearSpec,  # noqa: ARG002
        tensors: Mapping[str, Mapping[str, Tensor]],
        activation: str,
    ) -> nn.Module:
        """See Linear.build_experts."""
        held = {name: self._put(part) for name, part in tensors.items()}
        return CPUExperts(held["gate_up"], held["down"], activation, self.product)


class CPULinearLayer(PlainLinear):
    """The parts are views of one product."""

    def __init__(
        self, spec: LinearSpec, weight: Tensor, bias: Tensor | None, product: Product
    ) -> None:
        super().__init__(spec, weight, bias)
        self.product = product

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """See Linear.build."""
        out = self.product(x, self.weight, self.bias, self.out_dtype)
        return (out,) if len(self.parts) == 1 else torch.split(out, self.parts, -1)


class CPUExperts(PlainExperts):
    """Each expert on the tokens that chose it."""

    def __init__(
        self,
        gate_up: Mapping[str, Tensor],
        down: Mapping[str, Tensor],
        activation: str,
        product: Product,
    ) -> None:
        super().__init__(gate_up, down, activation)
        self.product = product

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See Linear.build_experts; the sum over experts is in float32."""
        total = torch.zeros(x.shape, dtype=torch.float32)
        for expert in torch.unique(ids).tolist():
            token, choice = torch.where(ids == expert)
            found = self.expert(expert, x[token]).float()
            total.index_add_(0, token, found * weights[token, choice, None])
        return total.to(x.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] -> [T, N] of x's dtype."""
        return self.product(x, weight, bias, x.dtype)
