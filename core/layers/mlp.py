"""The feed-forward half of a layer."""

from __future__ import annotations

from torch import Tensor, nn

from ...backends.ops import Ops
from .linear import RowParallel


class MLP(nn.Module):
    """down(activation(gate) * up), or down(activation(up)) where nothing is gated."""

    def __init__(
        self, gate_up: nn.Module, down: RowParallel, ops: Ops, activation: str, *, gated: bool
    ) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.ops = ops
        self.activation = activation
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]."""
        if self.gated:
            gate, up = self.gate_up(x)
            inner = self.ops.gated(gate, up, self.activation)
        else:
            inner = self.ops.activation(self.gate_up(x)[0], self.activation)
        out: Tensor = self.down(inner)
        return out
