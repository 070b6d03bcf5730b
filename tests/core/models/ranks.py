"""Ranks as threads of one process, with collectives that really add and gather."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from chipset.backends.collectives import Collectives

T = TypeVar("T")


class Ranks:
    """Where the ranks of one world meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[Tensor | None] = [None] * size

    def run(self, work: Callable[[int, Collectives], T]) -> list[T]:
        """`work(rank, collectives)` in a thread for each rank; what each gives."""

        def one(rank: int) -> T:
            try:
                with torch.inference_mode():
                    return work(rank, ThreadRank(self, rank))
            except BaseException:
                self.barrier.abort()  # or the others wait for this one
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(one, rank) for rank in range(self.size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
        if errors:
            raise errors[0]
        return [future.result() for future in futures]


class ThreadRank(Collectives):
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks = ranks
        self.rank = rank

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        total, *others = self._exchange(x, group)
        for other in others:
            total = total + other
        return total

    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        return torch.cat(self._exchange(x, group), dim)

    def _exchange(self, x: Tensor, group: str) -> list[Tensor]:
        assert group == "tensor"
        self.ranks.parts[self.rank] = x
        self.ranks.barrier.wait()
        parts = [part for part in self.ranks.parts if part is not None]
        self.ranks.barrier.wait()
        assert len({part.shape for part in parts}) == 1
        return parts
