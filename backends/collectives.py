"""Communication between ranks, as functions that return new tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Collectives(ABC):
    """Each is an op that the plugin's own compiler sees in the step. Identities under SPMD and in a world of one."""

    @abstractmethod
    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        """Sum over the ranks of `group`."""

    @abstractmethod
    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        """The parts of all ranks of `group`, side by side along `dim`."""
