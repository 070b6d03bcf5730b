"""Tensors given away: what a device that reuses their memory leaves behind is garbage."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from ...backends.kv_cache import Cache
from .rules import RuleBroken

GARBAGE = -(2**30)
"""What integers of a poisoned tensor are, or the least that they can be; floats are nan."""


def poison(tensors: Iterable[Tensor]) -> None:
    """Overwrite with nan, GARBAGE or False."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        else:
            lowest = 0 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min
            tensor.fill_(max(GARBAGE, lowest))


class Donation:
    """Which leaves of caches are gone."""

    def __init__(self) -> None:
        self._gone = WeakIdKeyDictionary()

    def check(self, cache: Cache) -> None:
        """Raises RuleBroken where a leaf was given away before."""
        if self.is_lost(cache):
            raise RuleBroken("donated cache", "a cache is used that was given to a step before")

    def is_lost(self, cache: Cache) -> bool:
        """Whether a leaf was given away."""
        return any(leaf in self._gone for leaf in pytree.tree_leaves(cache))

    def replace(self, old: Cache, new: Cache) -> None:
        """Poison the leaves of `old` that `new` does not hold."""
        kept = {id(leaf) for leaf in pytree.tree_leaves(new)}
        self._lose([leaf for leaf in pytree.tree_leaves(old) if id(leaf) not in kept])

    def lose(self, cache: Cache) -> None:
        """All leaves: a step died with them."""
        self._lose(pytree.tree_leaves(cache))

    def _lose(self, leaves: list[Tensor]) -> None:
        poison(leaves)
        for leaf in leaves:
            self._gone[leaf] = True
