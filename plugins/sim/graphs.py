"""A recorded step with the weights it holds: Graph, and CapturedGraph, whose addresses are recorded too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...backends.kv_cache import Cache
from .donation import poison
from .rules import RuleBroken
from .tape import Tape, record


class Graph:
    """Runs what a module ran, on other arguments: (StepInputs, Cache, …) -> (output, Cache)."""

    def __init__(self, weights: Sequence[Tensor], tape: Tape) -> None:
        self._weights = weights
        self._tape = tape

    @classmethod
    def make(cls, name: str, module: nn.Module, args: Any) -> tuple[Graph, Any]:
        """The graph, and what the module returned for `args`. Raises RuleBroken."""
        weights = [*module.parameters(), *module.buffers()]
        tape, made = record(name, module, weights, args)
        return cls(weights, tape), made

    def run(self, args: Any) -> Any:
        """See Graph."""
        return self._tape.replay([*self._weights, *pytree.tree_leaves(args)])


class CapturedGraph(Graph):
    """Reads static inputs and leaves static outputs, which the next run overwrites; knows one cache only."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        tape: Tape,
        inputs: Sequence[Tensor],
        output: Any,
        cache: Cache,
    ) -> None:
        super().__init__(weights, tape)
        self._inputs = inputs
        self._output = output
        self._addresses = _addresses(cache)

    @classmethod
    def make(cls, name: str, module: nn.Module, args: Any) -> tuple[Graph, Any]:
        """See Graph.make."""
        inputs, cache, *rest = args
        leaves, tree = pytree.tree_flatten((inputs, rest))
        static = [leaf.clone() for leaf in leaves]
        inputs, rest = pytree.tree_unflatten(static, tree)
        weights = [*module.parameters(), *module.buffers()]
        tape, (output, new) = record(name, module, weights, (inputs, cache, *rest))
        return cls(weights, tape, static, output, new), (output, new)

    def run(self, args: Any) -> Any:
        """See Graph.run. Raises RuleBroken for another cache than the one captured."""
        inputs, cache, *rest = args
        if _addresses(cache) != self._addresses:
            raise RuleBroken("captured addresses", "the cache is not the one that was captured")
        _copy(self._inputs, pytree.tree_leaves((inputs, rest)))
        count = len(pytree.tree_leaves(inputs))
        held = [*self._inputs[:count], *pytree.tree_leaves(cache), *self._inputs[count:]]
        output, new = self._tape.replay([*self._weights, *held])
        _copy(pytree.tree_leaves(self._output), pytree.tree_leaves(output))
        return self._output, new

    def forget(self) -> None:
        """Make what the last run left unreadable: another step has begun."""
        poison(pytree.tree_leaves(self._output))


def _addresses(cache: Cache) -> list[int]:
    return [leaf.data_ptr() for leaf in pytree.tree_leaves(cache)]


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
