"""Experts of a mixture in plain torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import activate


class Experts(nn.Module):
    """Every expert on every token, weighted by 0 where it was not chosen: shapes stay those of the bucket."""

    def __init__(self, num_experts: int, activation: str) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.activation = activation

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See Linear.build_experts; the sum over experts is in float32."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in range(self.num_experts):
            share = torch.where(ids == expert, weights, 0.0).sum(-1, keepdim=True)
            total = total + share * self.expert(expert, x).float()
        return total.to(x.dtype)

    def expert(self, index: int, x: Tensor) -> Tensor:
        """x [T, H] through one expert: [T, H]."""
        gate, up = self.product("gate_up", index, x).chunk(2, -1)
        return self.product("down", index, activate(gate, self.activation) * up)

    def product(self, name: str, index: int, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N] of x's dtype, by the weight `name` of one expert."""
        raise NotImplementedError


class PlainExperts(Experts):
    """Of plain weights."""

    gate_up: Tensor
    """[E, 2 * I, H], the gate first"""
    down: Tensor
    """[E, H, I]"""
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor], activation: str
    ) -> None:
        super().__init__(gate_up["weight"].shape[0], activation)
        self.register_buffer("gate_up", gate_up["weight"])
        self.register_buffer("down", down["weight"])
        self.register_buffer("gate_up_bias", gate_up.get("bias"))
        self.register_buffer("down_bias", down.get("bias"))

    def product(self, name: str, index: int, x: Tensor) -> Tensor:
        """See Experts.product."""
        biases = self.gate_up_bias if name == "gate_up" else self.down_bias
        weight = self.gate_up if name == "gate_up" else self.down
        return self.linear(x, weight[index], None if biases is None else biases[index])

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] -> [T, N] of x's dtype."""
        return F.linear(x, weight, bias)
