"""Collectives as operators: a compiler finds one operation a call, and knows what it returns."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from chipset.backends.reference.collectives import RankCollectives
from chipset.backends.reference.operators import OperatorCollectives


class Echo(RankCollectives):
    """A world of two in which the other rank has the same."""

    def size(self, group: str) -> int:
        return 1 if group == "alone" else 2

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        return x + x

    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        return torch.cat((x, x), dim)

    def reduce_scatter(self, x: Tensor, group: str, dim: int) -> Tensor:
        return (x + x).chunk(2, dim)[0].clone()

    def all_to_all(self, x: Tensor, group: str) -> Tensor:
        return torch.stack((x[0], x[0]))

    def send(self, x: Tensor, group: str, to: int) -> None:
        self.sent = x.clone()

    def receive(self, like: Tensor, group: str, source: int) -> Tensor:
        return self.sent.clone()


@pytest.fixture
def comm() -> Iterator[OperatorCollectives]:
    made = OperatorCollectives(Echo())
    yield made
    made.close()


def step(comm: OperatorCollectives, x: Tensor) -> tuple[Tensor, ...]:
    whole = comm.all_gather(comm.all_reduce(x, "tensor"), "tensor", 1)
    return whole, comm.reduce_scatter(whole, "tensor", 0), comm.all_to_all(x, "tensor")


def test_a_graph_holds_an_operation_a_call(comm: OperatorCollectives) -> None:
    graph = make_fx(lambda x: step(comm, x))(torch.ones(2, 3)).graph
    called = [node.target.__name__ for node in graph.nodes if node.op == "call_function"]
    names = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    assert called == [f"{name}.default" for name in names]


def test_a_graph_communicates_each_time_it_runs(comm: OperatorCollectives) -> None:
    graph = make_fx(lambda x: step(comm, x))(torch.ones(2, 3))
    x = torch.arange(6.0).reshape(2, 3)
    for found, wanted in zip(graph(x), step(comm, x), strict=True):
        assert torch.equal(found, wanted)


def test_shapes_are_known_without_values(comm: OperatorCollectives) -> None:
    x = torch.ones(2, 3)
    shapes = [made.shape for made in step(comm, x)]
    assert [made.shape for made in step(comm, x.to("meta"))] == shapes
    traced = make_fx(lambda x: step(comm, x), tracing_mode="fake")(x)
    assert [made.shape for made in traced(x)] == shapes
    assert comm.receive(x.to("meta"), "tensor", 0).shape == x.shape


def test_what_is_sent_is_received(comm: OperatorCollectives) -> None:
    comm.send(torch.arange(3.0), "tensor", 1)
    assert comm.receive(torch.empty(3), "tensor", 1).tolist() == [0, 1, 2]


def test_a_group_of_one_makes_no_operation(comm: OperatorCollectives) -> None:
    x = torch.ones(2)
    assert comm.all_reduce(x, "alone") is comm.all_gather(x, "alone", 0) is x
    assert comm.reduce_scatter(x, "alone", 0) is comm.all_to_all(x, "alone") is x


def test_two_worlds_keep_apart() -> None:
    class Other(Echo):
        def all_reduce(self, x: Tensor, group: str) -> Tensor:
            return x * 10

    first, second = OperatorCollectives(Echo()), OperatorCollectives(Other())
    x = torch.ones(1)
    assert (first.all_reduce(x, "tensor").item(), second.all_reduce(x, "tensor").item()) == (2, 10)
    first.close()
    assert second.all_reduce(x, "tensor").item() == 10
    second.close()


def test_many_worlds_one_after_another_leave_no_operators() -> None:
    for _ in range(20):
        comm = OperatorCollectives(Echo())
        assert comm.all_reduce(torch.ones(1), "tensor").item() == 2
        comm.close()
    del comm
    gc.collect()
    left = [
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("chipset_ranks_")
    ]
    assert not left
