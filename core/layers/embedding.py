"""The vocabulary at both ends: ids to hidden states, hidden states to logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...backends.collectives import Collectives


class Embedding(nn.Module):
    """Sum over the ranks, each of which holds some rows; then the multiplier."""

    def __init__(self, table: nn.Module, comm: Collectives, multiplier: float) -> None:
        super().__init__()
        self.table = table
        self.comm = comm
        self.multiplier = multiplier

    def forward(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, H]."""
        x = self.comm.all_reduce(self.table(ids), "tensor")
        return x if self.multiplier == 1 else x * self.multiplier


class Head(nn.Module):
    """Logits of the whole vocabulary, on every rank."""

    def __init__(
        self, linear: nn.Module, comm: Collectives, vocab_size: int, soft_cap: float | None
    ) -> None:
        super().__init__()
        self.linear = linear
        self.comm = comm
        self.vocab_size = vocab_size
        self.soft_cap = soft_cap

    def forward(self, x: Tensor) -> Tensor:
        """x [L, H] -> f32 [L, V]."""
        logits = self.comm.all_gather(self.linear(x)[0], "tensor", 1)
        if logits.shape[1] > self.vocab_size:  # the last rank's rows are padded
            logits = torch.split(logits, [self.vocab_size, logits.shape[1] - self.vocab_size], 1)[0]
        if self.soft_cap is None:
            return logits
        return (logits / self.soft_cap).tanh() * self.soft_cap
