"""Graphs on the emulated device: each step is traced once per bucket, and never after freeze()."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...backends.compiler import Compiler, CompileReport
from ...backends.errors import UnexpectedCompile
from ...backends.kv_cache import Cache
from ...backends.reference.staging import Staged, unpack
from ...backends.shapes import Bucket, Phase
from ...backends.step import StepInputs
from .donation import Donation, poison
from .rules import RuleBroken
from .tracing import trace

Leaves = tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What makes a graph its own."""

    name: str
    bucket: Bucket
    features: frozenset[str]
    leaves: Leaves
    """Shape and dtype of every input, the cache too."""


class SimCompiler(Compiler):
    """Traces whatever comes; the cache is written in place, or given away and poisoned where it was replaced."""

    def __init__(self, donation: Donation, *, donates: bool) -> None:
        self.donation = donation
        self.donates = donates
        self.graphs: dict[Key, fx.GraphModule] = {}
        self.num_late = 0
        """Compiles asked for after freeze."""
        self._frozen = False

    def wrap(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """See Compiler.wrap."""
        weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}

        def run(prepared: Staged, cache: Cache, *rest: Tensor) -> Any:
            if cache is None:
                raise RuleBroken("KV size", f"{name} runs before the cache is allocated")
            self.donation.check(cache)
            args = (read_by(name, unpack(prepared)), cache, *rest)
            key = key_of(name, args)
            graph = self.graphs.get(key)
            if graph is None:
                self._refuse_late(key)
                graph = self.graphs[key] = trace(name, module, weights, args)
            return self._call(graph, weights, args)

        return run

    def warm_up(
        self,
        runs: Sequence[tuple[Bucket, frozenset[str]]],
        run: Callable[[Bucket, frozenset[str]], None],
        progress: Callable[[int], None],
    ) -> CompileReport:
        """See Compiler.warm_up."""
        began = time.monotonic()
        super().warm_up(runs, run, progress)
        return CompileReport(
            num_graphs=len(self.graphs), seconds=time.monotonic() - began, bytes_reserved=0
        )

    @contextmanager
    def freeze(self) -> Iterator[None]:
        """See Compiler.freeze."""
        self._frozen = True
        try:
            yield
        finally:
            self._frozen = False

    def _call(self, graph: fx.GraphModule, weights: dict[str, Tensor], args: Any) -> Any:
        cache = args[1]
        try:
            output, new = graph(weights, *args)
        except BaseException:
            if self.donates:
                self.donation.lose(cache)
            raise
        if self.donates:
            self.donation.replace(cache, new)
        return output, new

    def _refuse_late(self, key: Key) -> None:
        if not self._frozen:
            return
        self.num_late += 1
        like = [k for k in self.graphs if (k.name, k.bucket, k.features) == key_parts(key)]
        what = "other shapes or dtypes" if like else "a bucket or variant that was not warmed up"
        raise UnexpectedCompile(
            f"{key.name} would be compiled after warm-up: {key.bucket} with "
            f"{sorted(key.features) or 'no features'} has {what}; warm it up"
        )


class Capture:
    """A graph with the addresses that it was captured with: inputs, outputs, and those of the cache."""

    def __init__(self, graph: fx.GraphModule, args: Any) -> None:
        self.graph = graph
        inputs, cache, *rest = args
        leaves, self._tree = pytree.tree_flatten((inputs, rest))
        self._inputs = [leaf.clone() for leaf in leaves]
        self._addresses = addresses(cache)
        self._outputs: list[Tensor] = []
        self._made: Any = None

    def replay(self, weights: dict[str, Tensor], args: Any) -> Any:
        """Copy the inputs in, run, and leave the outputs where the next replay will overwrite them."""
        inputs, cache, *rest = args
        if addresses(cache) != self._addresses:
            raise RuleBroken("captured addresses", "the cache is not the one that was captured")
        for static, leaf in zip(self._inputs, pytree.tree_leaves((inputs, rest)), strict=True):
            static.copy_(leaf)
        held, more = pytree.tree_unflatten(self._inputs, self._tree)
        output, cache = self.graph(weights, held, cache, *more)
        leaves = pytree.tree_leaves(output)
        if not self._outputs:
            self._outputs, self._made = leaves, output
        for static, leaf in zip(self._outputs, leaves, strict=True):
            if static is not leaf:
                static.copy_(leaf)
        return self._made, cache

    def forget(self) -> None:
        """Make what was drawn unreadable: another step has begun."""
        poison(self._outputs)


class CaptureCompiler(SimCompiler):
    """Captures steps of the declared buckets and runs all others as they come."""

    def __init__(self, donation: Donation, captured: Collection[Bucket]) -> None:
        super().__init__(donation, donates=False)
        self.captured = frozenset(captured)
        self._captures: dict[int, Capture] = {}
        self._last: dict[str, Capture] = {}

    def wrap(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """See Compiler.wrap."""
        replay = super().wrap(name, module)

        def run(prepared: Staged, *rest: Any) -> Any:
            last = self._last.pop(name, None)
            if last is not None:
                last.forget()
            if prepared.bucket in self.captured:
                return replay(prepared, *rest)
            with torch.inference_mode():
                return module(read_by(name, unpack(prepared)), *rest)

        return run

    def _call(self, graph: fx.GraphModule, weights: dict[str, Tensor], args: Any) -> Any:
        capture = self._captures.get(id(graph))
        if capture is None:
            capture = self._captures[id(graph)] = Capture(graph, args)
        name = "draw" if len(args) > 2 else "model"
        self._last[name] = capture
        return capture.replay(weights, args)


def addresses(cache: Cache) -> list[int]:
    """Of all leaves."""
    return [leaf.data_ptr() for leaf in pytree.tree_leaves(cache)]


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


def key_of(name: str, args: Any) -> Key:
    """Which fields and arrays are there follows from bucket, features and shapes."""
    inputs = args[0]
    leaves = tuple((leaf.shape, leaf.dtype) for leaf in pytree.tree_leaves(args))
    return Key(name=name, bucket=inputs.bucket, features=inputs.features, leaves=leaves)


def key_parts(key: Key) -> tuple[str, Bucket, frozenset[str]]:
    """All but the shapes."""
    return key.name, key.bucket, key.features
