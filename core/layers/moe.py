"""Routed experts in place of an MLP."""

from __future__ import annotations

from torch import Tensor, nn

from ...backends.collectives import Collectives
from ...backends.ops import Ops


class MoE(nn.Module):
    """Each token goes through its best experts, weighted by the router's softmax."""

    def __init__(
        self,
        router: nn.Module,
        experts: nn.Module,
        ops: Ops,
        comm: Collectives,
        *,
        experts_per_token: int,
        normalise: bool,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.ops = ops
        self.comm = comm
        self.experts_per_token = experts_per_token
        self.normalise = normalise

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]."""
        logits = self.router(x)[0]
        weights, ids = self.ops.route(logits, self.experts_per_token, normalise=self.normalise)
        return self.comm.all_reduce(self.experts(x, weights, ids), "tensor")
