"""Communication between ranks, as functions that return new tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Collectives(ABC):
    """Each is an op that the plugin's own compiler sees in the step: a call that writes in place vanishes from a traced
    graph without an error. Identities under SPMD and in a world of one.

    `group` is a key of Launch.groups, whose ranks all call the same members in the same order with equal shapes. What
    is reduced or gathered is the same bits on each of them, for all draw from it. A rank that waits for another longer
    than a few seconds raises, and Runtime.classify calls that device_lost. Capabilities.collectives says which there
    are.
    """

    @abstractmethod
    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        """Sum over the ranks of `group`, in the dtype of x."""

    @abstractmethod
    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        """The parts of all ranks of `group`, side by side along `dim`, in the order of the ranks."""

    def reduce_scatter(self, x: Tensor, group: str, dim: int) -> Tensor:
        """The sum over the ranks of `group`, cut along `dim` into equal parts, of which each rank gets its own."""
        raise NotImplementedError(f"{type(self).__name__} has no reduce_scatter")

    def all_to_all(self, x: Tensor, group: str) -> Tensor:
        """x [ranks, ...]: part r goes to rank r, and comes back as what rank r had for this one."""
        raise NotImplementedError(f"{type(self).__name__} has no all_to_all")

    def send(self, x: Tensor, group: str, to: int) -> None:
        """To the rank at index `to` of `group`, which receives it. Between steps."""
        raise NotImplementedError(f"{type(self).__name__} has no send")

    def receive(self, like: Tensor, group: str, source: int) -> Tensor:
        """Of shape and dtype of `like`, from the rank at index `source` of `group`, which sends it. Between steps."""
        raise NotImplementedError(f"{type(self).__name__} has no receive")
