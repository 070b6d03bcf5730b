"""Norms, alone and after a residual is added."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn

from ...backends.ops import Ops


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight)."""

    weight: Tensor

    def __init__(
        self, ops: Ops, weight: Tensor, eps: float, *, offset: float, weight_in_float: bool
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ops = ops
        self.eps = eps
        self.offset = offset
        self.weight_in_float = weight_in_float

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H]."""
        return self.ops.rms_norm(
            x, self.weight, self.eps, offset=self.offset, weight_in_float=self.weight_in_float
        )

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual)."""
        return self.ops.add_rms_norm(
            x,
            residual,
            self.weight,
            self.eps,
            offset=self.offset,
            weight_in_float=self.weight_in_float,
        )


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias."""

    weight: Tensor
    bias: Tensor

    def __init__(self, ops: Ops, weight: Tensor, bias: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.ops = ops
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H]."""
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual)."""
        total = x + residual
        return self.ops.layer_norm(total, self.weight, self.bias, self.eps), total


Norm: TypeAlias = RMSNorm | LayerNorm
