"""The sum over ranks, on one that plays two."""

import torch
from chipset.backends.reference.collectives import SingleRank
from chipset.backends.reference.telemetry import Counters
from torch.fx.experimental.proxy_tensor import make_fx

from chipset_abacus.backend import AbacusCollectives


class Twins(SingleRank):
    """The other rank has the same."""

    def size(self, group: str) -> int:
        return 2

    def all_gather(self, x: torch.Tensor, group: str, dim: int) -> torch.Tensor:
        return torch.cat([x, x], dim)


def collectives() -> AbacusCollectives:
    made = AbacusCollectives(Twins())
    made.counters = Counters()
    return made


def test_a_sum_is_rounded_once() -> None:
    comm = collectives()
    x = torch.tensor([1.0 + 2**-7, -3.0], dtype=torch.bfloat16)
    assert torch.equal(comm.all_reduce(x, "tensor"), x * 2)
    assert comm.counters["sums"] == 1


def test_a_compiler_sees_it() -> None:
    """And what is compiled gathers again each time that it runs."""
    comm = collectives()
    graph = make_fx(lambda x: comm.all_reduce(x, "tensor"))(torch.ones(3))
    assert any("all_gather" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(torch.full((3,), 4.0)), torch.full((3,), 8.0))
