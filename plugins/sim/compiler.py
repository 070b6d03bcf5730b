"""Graphs on the emulated device: each step is recorded once per bucket, and never after freeze()."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...backends.compiler import Compiler, CompileReport
from ...backends.errors import UnexpectedCompile
from ...backends.kv_cache import Cache
from ...backends.reference.staging import Staged, unpack
from ...backends.shapes import Bucket, Phase
from ...backends.step import StepInputs
from .donation import Donation
from .graphs import CapturedGraph, Graph
from .rules import RuleBroken


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What makes a graph its own."""

    name: str
    module: int
    """Number of the wrap."""
    bucket: Bucket
    features: frozenset[str]
    leaves: tuple[tuple[torch.Size, torch.dtype], ...]
    """Shape and dtype of every input, the cache too: which inputs there are follows from the rest."""


class SimCompiler(Compiler):
    """Every step is a graph. `donates`: leaves of the cache that a step replaced are poisoned, else it writes there."""

    graph: type[Graph] = Graph

    def __init__(self, donation: Donation, *, donates: bool) -> None:
        self.donation = donation
        self.donates = donates
        self.graphs: dict[Key, Graph] = {}
        self.num_late = 0
        """Graphs asked for after freeze."""
        self._frozen = False
        self._num_wrapped = 0

    def wrap(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """See Compiler.wrap."""
        self._num_wrapped += 1
        number = self._num_wrapped

        def run(prepared: Staged, cache: Cache, *rest: Tensor) -> Any:
            if cache is None:
                raise RuleBroken("KV size", f"{name} runs before the cache is allocated")
            self.donation.check(cache)
            args = (read_by(name, unpack(prepared)), cache, *rest)
            with torch.inference_mode():
                return self.run(key_of(name, number, args), module, args)

        return run

    def run(self, key: Key, module: nn.Module, args: Any) -> Any:
        """By the graph of that key; made, and made by running the module, where there is none."""
        graph, cache = self.graphs.get(key), args[1]
        if graph is None:
            self._refuse_late(key)
            self.graphs[key], (output, new) = self.graph.make(key.name, module, args)
        else:
            try:
                output, new = graph.run(args)
            except BaseException:
                if self.donates:
                    self.donation.lose(cache)
                raise
        if self.donates:
            self.donation.replace(cache, new)
        return output, new

    def warm_up(
        self,
        runs: Sequence[tuple[Bucket, frozenset[str]]],
        run: Callable[[Bucket, frozenset[str]], None],
        progress: Callable[[int], None],
    ) -> CompileReport:
        """See Compiler.warm_up."""
        began = time.monotonic()
        super().warm_up(runs, run, progress)
        seconds = time.monotonic() - began
        return CompileReport(num_graphs=len(self.graphs), seconds=seconds, bytes_reserved=0)

    @contextmanager
    def freeze(self) -> Iterator[None]:
        """See Compiler.freeze."""
        self._frozen = True
        try:
            yield
        finally:
            self._frozen = False

    def _refuse_late(self, key: Key) -> None:
        if not self._frozen:
            return
        self.num_late += 1
        is_known = any(replace(known, leaves=key.leaves) == key for known in self.graphs)
        differs = "its arrays have other shapes" if is_known else "that was not warmed up"
        raise UnexpectedCompile(
            f"{key.name} would be compiled after warm-up for {key.bucket} with "
            f"{sorted(key.features) or 'no features'}: {differs}; warm up all that fit() may return"
        )


class CaptureCompiler(SimCompiler):
    """Captures steps of the declared buckets and runs all others as they come."""

    graph = CapturedGraph

    def __init__(self, donation: Donation, captured: Collection[Bucket]) -> None:
        super().__init__(donation, donates=False)
        self.captured = frozenset(captured)
        self._last: dict[str, CapturedGraph] = {}

    def wrap(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """See Compiler.wrap."""
        replay = super().wrap(name, module)

        def run(prepared: Staged, *rest: Any) -> Any:
            last = self._last.pop(name, None)
            with torch.inference_mode():
                if last is not None:
                    last.forget()
                if prepared.bucket in self.captured:
                    return replay(prepared, *rest)
                return module(read_by(name, unpack(prepared)), *rest)

        return run

    def run(self, key: Key, module: nn.Module, args: Any) -> Any:
        """See SimCompiler.run."""
        made = super().run(key, module, args)
        self._last[key.name] = cast(CapturedGraph, self.graphs[key])
        return made


def read_by(name: str, inputs: StepInputs) -> StepInputs:
    """The part of the inputs that the wrapped function of that name may read: the rest must split no graphs."""
    nothing = cast(Tensor, None)
    if name == "model":
        return replace(inputs, features=frozenset(), sampling=nothing)
    if name == "draw":
        return replace(
            inputs,
            bucket=Bucket(
                phase=Phase.MIXED,
                num_rows=0,
                num_tokens=0,
                num_logits=inputs.bucket.num_logits,
                max_query=0,
                blocks_per_row=0,
            ),
            token_ids=nothing,
            positions=nothing,
            logit_index=nothing,
            token_slot=None,
            attention=None,
        )
    return inputs


def key_of(name: str, module: int, args: Any) -> Key:
    """`args` are StepInputs and the rest of what the wrapped function takes."""
    inputs = args[0]
    return Key(
        name=name,
        module=module,
        bucket=inputs.bucket,
        features=inputs.features,
        leaves=tuple((leaf.shape, leaf.dtype) for leaf in pytree.tree_leaves(args)),
    )
