"""Linear layers on the CPU: which kernel takes which, and the modules built of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...backends.quantization import EmbeddingSpec, LinearSpec, Verdict
from ...backends.reference.dtypes import torch_dtype
from ...backends.reference.experts import Experts, PlainExperts
from ...backends.reference.packed import KINDS
from ...backends.reference.quantization import PlainEmbedding, PlainLinear, ReferenceLinear
from ...backends.runtime import Runtime
from .packed import WidenedWeight
from .packed_library import Int4Weight, Int8Weight, int4_verdict, int8_verdict
from .product import Product
from .scratch import Scratch

WIDENED = "widened in cache"


class CPULinear(ReferenceLinear):
    """Plain weights, and every packed kind of WeightFormat's table."""

    def __init__(self, runtime: Runtime, product: Product) -> None:
        super().__init__(runtime, KINDS | {"plain"})
        self.product = product
        self.codes = Scratch()

    def kernels(self, spec: LinearSpec) -> Sequence[Verdict]:
        """See Linear.kernels."""
        kind = spec.weight.kind
        if kind not in KINDS:
            return super().kernels(spec)
        reason = f"{kind} becomes float32 slice by slice for each product"
        widened = Verdict(kernel=WIDENED, ok=True, reason=reason)
        if kind == "int4":
            return (int4_verdict(spec), widened)
        return (int8_verdict(spec), widened) if kind == "int8" else (widened,)

    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        """See Linear.build."""
        if spec.weight.kind != "plain":
            return CPUPackedLinear(spec, self.packed(spec, tensors), tensors.get("bias"))
        held = self._put(tensors)
        return CPULinearLayer(spec, held["weight"], held.get("bias"), self.product)

    def packed(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        """(x [T, in_features], out_dtype) -> [T, N] by the best kernel that takes the layer; bias is left out."""
        if spec.weight.kind == "int4" and int4_verdict(spec).ok:
            return Int4Weight(spec.weight, tensors, self.product, self.codes)
        if spec.weight.kind == "int8" and int8_verdict(spec).ok:
            return Int8Weight(spec.weight, tensors, self.product, self.codes)
        return WidenedWeight(spec.weight, tensors, self.product, self.codes)

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
        gate_up: LinearSpec,
        down: LinearSpec,
        tensors: Mapping[str, Mapping[str, Tensor]],
        activation: str,
    ) -> nn.Module:
        """See Linear.build_experts."""
        if gate_up.weight.kind == down.weight.kind == "plain":
            held = {name: self._put(part) for name, part in tensors.items()}
            return CPUExperts(held["gate_up"], held["down"], activation, self.product)
        layers = [
            nn.ModuleList(
                self.build(spec, {name: tensor[index] for name, tensor in tensors[key].items()})
                for index in range(spec.num_experts)
            )
            for key, spec in (("gate_up", gate_up), ("down", down))
        ]
        return CPUPackedExperts(layers[0], layers[1], activation)


class CPULinearLayer(PlainLinear):
    """The parts are views of one product."""

    def __init__(
        self, spec: LinearSpec, weight: Tensor, bias: Tensor | None, product: Product
    ) -> None:
        super().__init__(spec, weight, bias)
        self._product = product

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """See Linear.build."""
        out = self.product(x)
        return (out,) if len(self.parts) == 1 else torch.split(out, self.parts, -1)

    def product(self, x: Tensor) -> Tensor:
        """[T, N], all parts side by side."""
        return self._product(x, self.weight, self.bias, self.out_dtype)


class CPUPackedLinear(nn.Module):
    """As CPULinearLayer, of a packed weight."""

    bias: Tensor | None

    def __init__(self, spec: LinearSpec, weight: nn.Module, bias: Tensor | None) -> None:
        super().__init__()
        self.parts = list(spec.parts)
        self.out_dtype = torch_dtype(spec.out_dtype)
        self.weight = weight
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """See Linear.build."""
        out = self.product(x)
        return (out,) if len(self.parts) == 1 else torch.split(out, self.parts, -1)

    def product(self, x: Tensor) -> Tensor:
        """[T, N], all parts side by side."""
        out: Tensor = self.weight(x, self.out_dtype)
        if self.bias is not None:
            out = out.add_(self.bias)
        return out.to(self.out_dtype)


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
        self._product = product

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See Linear.build_experts."""
        return gathered(self, x, weights, ids)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] -> [T, N] of x's dtype."""
        return self._product(x, weight, bias, x.dtype)


class CPUPackedExperts(Experts):
    """Each expert on the tokens that chose it; a layer for each, of which some may be plain."""

    def __init__(self, gate_up: nn.ModuleList, down: nn.ModuleList, activation: str) -> None:
        super().__init__(len(down), activation)
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See Linear.build_experts."""
        return gathered(self, x, weights, ids)

    def product(self, name: str, index: int, x: Tensor) -> Tensor:
        """See Experts.product."""
        layer = (self.gate_up if name == "gate_up" else self.down)[index]
        assert isinstance(layer, CPULinearLayer | CPUPackedLinear)
        return layer.product(x)


def gathered(experts: Experts, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Experts' sum, each on the tokens that chose it; added up in float32."""
    total = torch.zeros(x.shape, dtype=torch.float32)
    for expert in torch.unique(ids).tolist():
        token, choice = torch.where(ids == expert)
        found = experts.expert(expert, x[token]).float()
        total.index_add_(0, token, found * weights[token, choice, None])
    return total.to(x.dtype)
