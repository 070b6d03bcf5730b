"""Runner: the half of the engine beside the device, and the Executor of a world of one.

StepBatch -> prepare -> model -> draw -> fetch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import nn

from ..backends.backend import Backend
from ..backends.errors import UnexpectedCompile
from ..backends.kv_cache import Cache, KVPlan
from ..backends.options import SamplingParams
from ..backends.plugin import Launch
from ..backends.runtime import ErrorClass, Pending
from ..backends.shapes import BatchShape, Bucket, Phase
from ..backends.step import StepBatch, StepInputs, StepOutput
from .batch import BatchBuilder
from .executors.executor import Reset
from .kv_cache.manager import BlockTable
from .messages import Submit
from .models.report import WeightReport
from .request import Request
from .scheduler import Row

FIRST_STEPS = {Phase.PREFILL: 8, Phase.DECODE: 1}
"""Tokens of the steps run before the first request where shapes are dynamic: libraries set themselves up there."""


class Draw(nn.Module):
    """(StepInputs, Cache, logits) -> (StepOutput, Cache)."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.sampler = backend.sampler

    def forward(
        self, inputs: StepInputs, cache: Cache, logits: torch.Tensor
    ) -> tuple[StepOutput, Cache]:
        """One row of logits, one token."""
        return self.sampler(logits, inputs, cache)


class FusedStep(nn.Module):
    """(StepInputs, Cache) -> (StepOutput, Cache)."""

    def __init__(self, model: nn.Module, draw: Draw) -> None:
        super().__init__()
        self.model, self.draw = model, draw

    def forward(self, inputs: StepInputs, cache: Cache) -> tuple[StepOutput, Cache]:
        """Model and draw as one graph."""
        logits, cache = self.model(inputs, cache)
        output: tuple[StepOutput, Cache] = self.draw(inputs, cache, logits)
        return output


class Runner:
    """One worker: a backend, a model and its cache. One thread drives it."""

    def __init__(
        self, backend: Backend, launch: Launch, model: nn.Module, report: WeightReport
    ) -> None:
        self.backend = backend
        self.launch = launch
        self.weights: Sequence[WeightReport] = (report,)
        self.builder = BatchBuilder(
            launch.model,
            launch.options,
            launch.shapes.batch,
            has_token_slots=launch.capabilities.overlapped_steps,
        )
        draw = Draw(backend)
        self._is_fused = launch.capabilities.fused_draw
        if self._is_fused:
            self._step = backend.compiler.wrap("step", FusedStep(model, draw).eval())
        else:
            self._model = backend.compiler.wrap("model", model.eval())
            self._draw = backend.compiler.wrap("draw", draw.eval())
        self._cache: Cache = None
        self._plans: Sequence[KVPlan] = ()
        self._frozen = ExitStack()

    @torch.inference_mode()
    def budget(self) -> int:
        """Bytes for KV blocks on this worker's device."""
        profile = self.launch.capabilities.kv_budget == "profile"
        return self.backend.kv.budget(
            self.launch.options.memory_utilisation, self._run_largest if profile else None
        )

    def block_bytes(self) -> list[int]:
        """Bytes of a block, per KV group."""
        return [self.backend.kv.block_bytes(group) for group in self.launch.model.groups]

    @torch.inference_mode()
    def allocate(self, num_blocks: Sequence[int]) -> None:
        """The cache, with so many blocks per KV group."""
        groups = self.launch.model.groups
        self._plans = [
            KVPlan(group=g, num_blocks=n) for g, n in zip(groups, num_blocks, strict=True)
        ]
        self._cache = self.backend.kv.allocate(self._plans)

    @torch.inference_mode()
    def replace_lost_cache(self) -> bool:
        """After a step that raised: allocate anew if the step took the cache with it. Whether it had."""
        if self.backend.kv.usable(self._cache):
            return False
        self.backend.kv.free(self._cache)
        self._cache = None
        self._cache = self.backend.kv.allocate(self._plans)
        return True

    def classify(self, error: Exception) -> ErrorClass:
        """What a step that raised means. A missing graph is a matter of the step's shape, so of its requests."""
        if isinstance(error, UnexpectedCompile):
            return "request"
        return self.backend.runtime.classify(error)

    @torch.inference_mode()
    def warm_up(self, num_blocks: int, progress: Callable[[int, int], None]) -> None:
        """Compile what will be needed, then promise that nothing more is."""
        runs = self._warm_up_runs(num_blocks)
        sink = self.launch.options.max_batch_rows
        self.reset((sink, None))
        if "penalties" in self.launch.capabilities.features:
            self.reset((sink, np.zeros(self.launch.model.vocab_size, np.int32)))
        self.backend.compiler.warm_up(
            runs, self._run_padding, lambda done: progress(done, len(runs))
        )
        self._frozen.enter_context(self.backend.compiler.freeze())

    @torch.inference_mode()
    def step(self, batch: StepBatch, resets: Sequence[Reset] = ()) -> StepOutput | None:
        """Run one step and wait for what it drew; None, and no wait, where it draws nothing."""
        for reset in resets:
            self.reset(reset)
        pending = self._start(batch)
        return None if pending is None else pending.result()

    @torch.inference_mode()
    def reset(self, reset: Reset) -> None:
        """A request takes a slot. Outside steps."""
        self._cache = self.backend.kv.reset_slot(self._cache, *reset)

    def counters(self) -> dict[str, float]:
        """What the backend counts itself, by name."""
        return dict(self.backend.telemetry.counters())

    def check(self) -> None:
        """Nothing to look at: this worker is in the engine's own process."""

    def close(self) -> None:
        """Free the cache and leave the device."""
        self._frozen.close()
        if self._cache is not None:
            self.backend.kv.free(self._cache)
            self._cache = None
        self.backend.close()

    def _start(self, batch: StepBatch) -> Pending[StepOutput] | None:
        span = self.backend.telemetry.span
        with span("prepare"):
            prepared = self.backend.prepare(batch)
        # a batch of padding alone is a warm-up: it must touch every graph that a real one would
        draws = batch.num_logits > 0 or batch.num_rows == 0
        if self._is_fused:
            with span("step"):
                output, self._cache = self._step(prepared, self._cache)
        else:
            with span("model"):
                logits, self._cache = self._model(prepared, self._cache)
            if not draws:
                return None
            with span("draw"):
                output, self._cache = self._draw(prepared, self._cache, logits)
        return self.backend.runtime.fetch(output) if draws else None

    def _warm_up_runs(self, num_blocks: int) -> list[tuple[Bucket, frozenset[str]]]:
        """Each bucket with each variant; where drawing is a graph of its own, each variant once per L."""
        shapes = self.launch.shapes
        buckets, variants = shapes.buckets(num_blocks), shapes.draw_variants()
        if not buckets:
            return [(shapes.fit(_first_step(phase)), frozenset()) for phase in FIRST_STEPS]
        if self._is_fused:
            return [(bucket, variant) for bucket in buckets for variant in variants]
        runs: list[tuple[Bucket, frozenset[str]]] = []
        seen: set[tuple[int, frozenset[str]]] = set()
        for bucket in buckets:
            fresh = [v for v in variants if (bucket.num_logits, v) not in seen]
            seen |= {(bucket.num_logits, variant) for variant in fresh}
            runs += [(bucket, variant) for variant in fresh or [frozenset[str]()]]
        return runs

    def _run_padding(self, bucket: Bucket, features: frozenset[str]) -> None:
        pending = self._start(self.builder.build((), bucket, features))
        if pending is not None:
            pending.result()

    def _run_largest(self) -> None:
        """The steps whose memory must stay free, on a cache of two blocks."""
        shapes, groups = self.launch.shapes, self.launch.model.groups
        variants = shapes.draw_variants() or [self.launch.capabilities.features]
        self.allocate([2] * len(groups))
        for shape in shapes.largest():
            rows = _rows_of(shape, self.launch.options.block_size, len(groups))
            batch = self.builder.build(rows, shapes.fit(shape), max(variants, key=len))
            pending = self._start(batch)
            if pending is not None:
                pending.result()
        self.backend.runtime.synchronize()
        self.backend.kv.free(self._cache)
        self._cache = None


def _first_step(phase: Phase) -> BatchShape:
    """One row, as a first request brings it."""
    num_tokens = FIRST_STEPS[phase]
    return BatchShape(
        phase=phase,
        num_rows=1,
        num_tokens=num_tokens,
        num_logits=1,
        max_query=num_tokens,
        max_context=num_tokens,
        max_computed=0,
        num_blocks=1,
        max_block=0,
    )


def _rows_of(shape: BatchShape, block_size: int, num_groups: int) -> list[Row]:
    """Rows of that shape; every table entry is block 1."""
    rows, left = [], shape.num_tokens
    for index in range(shape.num_rows):
        count = max(1, min(shape.max_query, left - (shape.num_rows - index - 1)))
        left -= count
        num_blocks = -(-shape.max_context // block_size)
        submit = Submit(
            request_id=index,
            prompt=[0] * shape.max_context,
            sampling=SamplingParams(),
            max_new_tokens=1,
            stop_ids=[],
        )
        request = Request.from_submit(submit, max_new_tokens=1)
        request.slot = index
        request.table = BlockTable(salt="", blocks=[[1] * num_blocks for _ in range(num_groups)])
        start = shape.max_context - count
        rows.append(Row(request=request, start=start, count=count, is_decode=False))
    return rows
