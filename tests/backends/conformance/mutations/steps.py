"""Mistakes about compiling, waiting and whose arrays are whose."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch

from chipset.backends.reference.runtime import HostRuntime, Ready
from chipset.backends.reference.staging import Staged
from chipset.backends.runtime import Pending
from chipset.backends.step import StepBatch, StepOutput

from ..bucketed import CountingCompiler
from ..mutation import Mutation
from ..reference_plugin import ReferenceBackend, ReferencePlugin


class NeverFrozen(CountingCompiler):
    @contextmanager
    def freeze(self):  # type: ignore[no-untyped-def]
        yield


class ByFeatures(CountingCompiler):
    def key(self, name: str, staged: Staged) -> tuple[object, ...]:
        return (staged.bucket, staged.features)


class Leaving(CountingCompiler):
    """Gives the cache away before it looks for the graph."""

    def wrap(self, name, module):  # type: ignore[no-untyped-def]
        run = super().wrap(name, module)

        def leaving(staged, cache, *rest):  # type: ignore[no-untyped-def]
            kept = {n: pages.clone() for n, pages in cache.keys.items()}
            for pages in cache.keys.values():
                pages.fill_(torch.nan)
            if not self.is_frozen or not staged.bucket.num_rows % 2:
                for number, pages in cache.keys.items():
                    pages.copy_(kept[number])
            return run(staged, cache, *rest)

        return leaving


class ByName(CountingCompiler):
    """Keeps one graph for each name and bucket, whichever module was wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: dict[Any, Any] = {}

    def wrap(self, name, module):  # type: ignore[no-untyped-def]
        run = super().wrap(name, module)

        def found(staged, *rest):  # type: ignore[no-untyped-def]
            return self.graphs.setdefault((name, self.key(name, staged)), run)(staged, *rest)

        return found


class ForgetsRuns(CountingCompiler):
    def warm_up(self, runs, run, progress):  # type: ignore[no-untyped-def]
        return super().warm_up(runs[::2], run, progress)


class StaticOutputs(HostRuntime):
    """Each step's ids are copied into the same buffer."""

    def __init__(self) -> None:
        self.buffer = np.zeros(4096, np.int32)

    def fetch(self, output: StepOutput) -> Pending[StepOutput]:
        found = super().fetch(output).result()
        ids = self.buffer[: found.ids.shape[0]]
        ids[:] = found.ids
        return Ready(StepOutput(**{**_fields(found), "ids": ids}))


class Newest(Pending[StepOutput]):
    def __init__(self, runtime: NewestOnly) -> None:
        self.runtime = runtime

    def done(self) -> bool:
        return True

    def result(self) -> StepOutput:
        return self.runtime.newest


class NewestOnly(HostRuntime):
    """Whoever waits gets the outputs of the step that was started last."""

    newest: StepOutput

    def fetch(self, output: StepOutput) -> Pending[StepOutput]:
        self.newest = super().fetch(output).result()
        return Newest(self)


class Bound(Pending[StepOutput]):
    def __init__(self, output: StepOutput) -> None:
        self.output, self.thread = output, threading.get_ident()

    def done(self) -> bool:
        return True

    def result(self) -> StepOutput:
        if threading.get_ident() != self.thread:
            return StepOutput(**{**_fields(self.output), "ids": self.output.ids * 0 - 1})
        return self.output


class OneThread(HostRuntime):
    def fetch(self, output: StepOutput) -> Pending[StepOutput]:
        return Bound(super().fetch(output).result())


class WaitsInPrepare(ReferenceBackend):
    def prepare(self, batch: StepBatch) -> Staged:
        self.runtime.synchronize()
        return super().prepare(batch)


class WaitsForAll(ReferenceBackend):
    """Every step is fetched and waited for, whether anybody asks or not."""

    def prepare(self, batch: StepBatch) -> Staged:
        staged = super().prepare(batch)
        zeros = torch.zeros(1, dtype=torch.int32)
        self.runtime.fetch(StepOutput(ids=zeros, finite=zeros)).result()
        return staged


class WritesBatch(ReferenceBackend):
    def prepare(self, batch: StepBatch) -> Staged:
        staged = super().prepare(batch)
        np.copyto(batch.token_ids, -1)
        return staged


class ChangesTorch(ReferenceBackend):
    def prepare(self, batch: StepBatch) -> Staged:
        torch.set_float32_matmul_precision("high")
        return super().prepare(batch)

    def close(self) -> None:
        torch.set_float32_matmul_precision("highest")


def _fields(output: StepOutput) -> dict[str, Any]:
    return {field.name: getattr(output, field.name) for field in fields(output)}


def _with(name: str, mistake: str, **parts: object) -> Mutation:
    return Mutation(
        name=name, area="steps", mistake=mistake, plugin=partial(ReferencePlugin, **parts)
    )


MUTATIONS: tuple[Mutation, ...] = (
    _with("never frozen", "a compile after freeze goes unnoticed", compiler=NeverFrozen),
    _with("graphs by features", "the model's graph depends on how is drawn", compiler=ByFeatures),
    _with("cache left before the look-up", "a refused step spoils the cache", compiler=Leaving),
    _with("graphs by name", "another module's graph is run", compiler=ByName),
    _with("runs left out", "warm_up makes every second graph", compiler=ForgetsRuns),
    _with("static outputs", "the next step overwrites what was fetched", runtime=StaticOutputs),
    _with("newest outputs", "a result is that of the step started last", runtime=NewestOnly),
    _with("bound to a thread", "result() elsewhere gives garbage", runtime=OneThread),
    _with("waits in prepare", "the device is waited for before the step", backend=WaitsInPrepare),
    _with("waits for every step", "also for those that draw nothing", backend=WaitsForAll),
    _with("writes to the batch", "token ids are spoiled once staged", backend=WritesBatch),
    _with("changes torch", "global precision is another after a step", backend=ChangesTorch),
)
