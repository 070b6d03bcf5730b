from __future__ import annotations

import torch
from torch import Tensor, nn

from chipset.backends.reference.collectives import SingleRank
from chipset.backends.reference.ops import ReferenceOps
from chipset.core.layers.moe import MoE


class Router(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (torch.tensor([[0.0, 3.0, 1.0]]).expand(x.shape[0], 3),)


class Shares(nn.Module):
    """Each expert e gives e + 1."""

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return (weights * (ids + 1)).sum(-1, keepdim=True).expand_as(x)


def mixed(*, k: int, normalise: bool) -> float:
    moe = MoE(
        Router(), Shares(), ReferenceOps(), SingleRank(), experts_per_token=k, normalise=normalise
    )
    return float(moe(torch.zeros(2, 4))[0, 0])


def test_the_best_experts_are_mixed_by_their_share() -> None:
    share = torch.softmax(torch.tensor([0.0, 3.0, 1.0]), 0)
    best_two = (2 * share[1] + 3 * share[2]).item()
    assert abs(mixed(k=1, normalise=True) - 2) < 1e-6
    assert abs(mixed(k=2, normalise=False) - best_two) < 1e-6
    assert abs(mixed(k=2, normalise=True) - best_two / (share[1] + share[2]).item()) < 1e-6
