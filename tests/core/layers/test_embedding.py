from __future__ import annotations

import torch
from torch import Tensor, nn

from chipset.backends.collectives import Collectives
from chipset.core.layers.embedding import Embedding, Head


class TwoRanks(Collectives):
    """The other rank holds twice what this one does."""

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        assert group == "tensor"
        return 3 * x

    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        assert group == "tensor"
        return torch.cat((x, 2 * x), dim)


class Parts(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


def test_embeddings_of_all_ranks_are_added_and_multiplied() -> None:
    table = nn.Embedding.from_pretrained(torch.eye(4))
    x = Embedding(table, TwoRanks(), 0.5)(torch.tensor([2, 0]))
    assert torch.equal(x, 1.5 * torch.eye(4)[[2, 0]])


def test_the_last_ranks_padding_is_no_logit() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(Head(Parts(), TwoRanks(), 6, None)(x), torch.cat((x, 2 * x), 1))
    assert torch.equal(Head(Parts(), TwoRanks(), 5, None)(x), torch.cat((x, 2 * x), 1)[:, :5])


def test_soft_caps_bound_logits_and_keep_their_order() -> None:
    x = torch.tensor([[-1000.0, -1.0, 0.0, 1.0, 1000.0]])
    capped = Head(Parts(), TwoRanks(), 5, 30.0)(x)
    assert torch.equal(capped, 30 * torch.tanh(x / 30))
    assert capped.abs().max() <= 30
