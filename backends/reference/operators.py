"""Collectives that a compiler sees: each member one operator of torch, which returns a new tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .collectives import RankCollectives

SCHEMAS = (
    "all_reduce(Tensor x, str group) -> Tensor",
    "all_gather(Tensor x, str group, int dim) -> Tensor",
    "reduce_scatter(Tensor x, str group, int dim) -> Tensor",
    "all_to_all(Tensor x, str group) -> Tensor",
    "send(Tensor x, str group, int to) -> ()",
    "receive(Tensor like, str group, int source) -> Tensor",
)


class OperatorCollectives(RankCollectives):
    """The members of `host`, as operators that take tensors of any device which runs operators of the CPU.

    Whoever records a step finds one operation for each call, and running it again communicates again; Python that
    talked to other processes on its own would run once, while the step is recorded, and vanish. Groups of one rank
    make no operation. The operators live until close(), under a name of their own.
    """

    def __init__(self, host: RankCollectives) -> None:
        self._host = host
        space = f"chipset_ranks_{id(self):x}"
        library: Any = Library(space, "FRAGMENT")  # type: ignore[no-untyped-call]
        shapes = _Shapes(host)
        for schema in SCHEMAS:
            name = schema.partition("(")[0]
            library.define(schema)
            library.impl(name, getattr(host, name), "CPU")
            library.impl(name, getattr(shapes, name), "Meta")
        self._library = library
        self._operators: Any = getattr(torch.ops, space)

    def size(self, group: str) -> int:
        """See RankCollectives.size."""
        return self._host.size(group)

    def close(self) -> None:
        """See RankCollectives.close. Graphs that hold the operators cannot run any more."""
        self._library = None
        self._operators = None
        self._host.close()

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        """See Collectives.all_reduce."""
        return x if self.size(group) == 1 else self._operators.all_reduce(x, group)

    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        """See Collectives.all_gather."""
        return x if self.size(group) == 1 else self._operators.all_gather(x, group, dim)

    def reduce_scatter(self, x: Tensor, group: str, dim: int) -> Tensor:
        """See Collectives.reduce_scatter."""
        return x if self.size(group) == 1 else self._operators.reduce_scatter(x, group, dim)

    def all_to_all(self, x: Tensor, group: str) -> Tensor:
        """See Collectives.all_to_all."""
        return x if self.size(group) == 1 else self._operators.all_to_all(x, group)

    def send(self, x: Tensor, group: str, to: int) -> None:
        """See Collectives.send."""
        self._operators.send(x, group, to)

    def receive(self, like: Tensor, group: str, source: int) -> Tensor:
        """See Collectives.receive."""
        received: Tensor = self._operators.receive(like, group, source)
        return received


class _Shapes:
    """What each operator returns, without values: for compilers that look before they run."""

    def __init__(self, host: RankCollectives) -> None:
        self._host = host

    def all_reduce(self, x: Tensor, group: str) -> Tensor:  # noqa: ARG002
        return _empty(x, x.shape)

    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        return _empty(x, _replaced(x, dim, x.shape[dim] * self._host.size(group)))

    def reduce_scatter(self, x: Tensor, group: str, dim: int) -> Tensor:
        return _empty(x, _replaced(x, dim, x.shape[dim] // self._host.size(group)))

    def all_to_all(self, x: Tensor, group: str) -> Tensor:  # noqa: ARG002
        return _empty(x, x.shape)

    def send(self, x: Tensor, group: str, to: int) -> None:
        pass

    def receive(self, like: Tensor, group: str, source: int) -> Tensor:  # noqa: ARG002
        return _empty(like, like.shape)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return like.new_empty(tuple(shape))


def _replaced(x: Tensor, dim: int, size: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] = size
    return shape
