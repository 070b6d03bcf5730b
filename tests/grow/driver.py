"""A model on a backend, driven by hand: the core's parts without its scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from chipset.backends.capabilities import Capabilities
from chipset.backends.options import EngineOptions, SamplingParams
from chipset.backends.registry import Registry
from chipset.backends.shapes import BatchShape, Phase
from chipset.backends.step import StepBatch, StepOutput
from chipset.core.conformance.traffic import make_submit
from chipset.core.files import ModelFiles
from chipset.core.kv_cache.manager import KVCacheManager
from chipset.core.models.families import load_config
from chipset.core.plan import plan_launches
from chipset.core.request import Request
from chipset.core.runner import Runner
from chipset.core.scheduler import Row
from chipset.core.worker import load_runner

BACKENDS = ("cpu", "sim-gpu", "sim-gaudi", "sim-neuron", "sim-tpu")
MAX_CONTEXT = 128
STEP_TOKENS = 96
Change = Callable[[StepBatch], StepBatch]


@dataclass
class Driver:
    """A runner, and which blocks and slots its texts hold."""

    runner: Runner
    kv: KVCacheManager
    num_opened: int = 0

    def open(self, prompt: Sequence[int], sampling: SamplingParams | None = None) -> Request:
        """A request with a slot and no blocks yet."""
        number, self.num_opened = self.num_opened, self.num_opened + 1
        submit = make_submit(number, prompt, MAX_CONTEXT, sampling or SamplingParams())
        request = Request.from_submit(submit, max_new_tokens=MAX_CONTEXT)
        request.admit(number, self.kv.open(request.tokens))
        self.runner.reset((number, self.runner.builder.counts(request)))
        return request

    def rows(self, requests: Sequence[Request]) -> list[Row]:
        """What is left of each text, with the blocks that it needs. The drafts of a decode row are in its text."""
        rows = []
        for request in requests:
            assert request.table is not None
            self.kv.trim(request.table, request.num_computed)
            assert self.kv.reserve(request.table, len(request.tokens)), "no blocks left"
            start, count = request.num_computed, len(request.tokens) - request.num_computed
            rows.append(Row(request=request, start=start, count=count, is_decode=request.is_steady))
        return rows

    def run(
        self, rows: Sequence[Row], num_logits: int | None = None, change: Change = lambda b: b
    ) -> StepOutput:
        """One step. Raises TooLarge where the backend has no bucket for it. `change`: of the batch before it runs."""
        launch, builder = self.runner.launch, self.runner.builder
        tables = [row.request.table for row in rows]
        shape = BatchShape(
            phase=Phase.DECODE if rows[0].is_decode else Phase.PREFILL,
            num_rows=len(rows),
            num_tokens=sum(row.count for row in rows),
            num_logits=num_logits or len(rows),
            max_query=max(row.count for row in rows),
            max_context=max(row.end for row in rows),
            max_computed=max(row.start for row in rows),
            num_blocks=sum(-(-row.end // self.kv.block_size) for row in rows),
            max_block=max(block for t in tables if t for blocks in t.blocks for block in blocks),
        )
        needed = frozenset[str]().union(*(row.request.features for row in rows))
        variants = launch.shapes.draw_variants() or [needed]
        variant = min((v for v in variants if needed <= v), key=len)
        output = self.runner.step(change(builder.build(rows, launch.shapes.fit(shape), variant)))
        assert output is not None
        return output

    def generate(self, requests: Sequence[Request], count: int) -> list[list[int]]:
        """The next `count` tokens of each text: prompts one after the other, then all together."""
        for _ in range(count):
            decoding = all(request.is_steady for request in requests)
            for together in [requests] if decoding else [[request] for request in requests]:
                drawn = np.asarray(self.run(self.rows(together)).ids)
                for request, token in zip(together, drawn.tolist(), strict=False):
                    request.advance(len(request.tokens) - request.num_computed)
                    request.draw(token)
        return [request.tokens[-count:] for request in requests]


def capabilities_of(backend: str) -> Capabilities:
    """What a backend claims."""
    plugin = Registry.discover().select(backend).plugin
    return plugin.capabilities(plugin.probe())


@contextmanager
def driving(
    backend: str,
    files: ModelFiles,
    num_blocks: Sequence[int] = (24,),
    before_freeze: Callable[[Driver], None] = lambda driver: None,
    **options: object,
) -> Iterator[Driver]:
    """A driver of a backend of its own, with so many blocks for each KV group."""
    plugin = Registry.discover().select(backend).plugin
    probe, config = plugin.probe(), load_config(files.config)
    chunked = plugin.capabilities(probe).chunked_prefill
    asked = EngineOptions(
        dtype="float32",
        max_context=MAX_CONTEXT,
        max_batch_tokens=STEP_TOKENS if chunked else None,
        max_batch_rows=4,
    )
    (launch,) = plan_launches(plugin, [probe], config, replace(asked, **options))  # type: ignore[arg-type]
    runner = load_runner(launch, plugin, config, files, None, lambda *_: None)
    try:
        runner.allocate(num_blocks)
        kv = KVCacheManager(
            launch.model.groups,
            num_blocks,
            block_size=launch.options.block_size,
            max_step_tokens=launch.shapes.batch.max_tokens,
            prefix_cache=False,
        )
        driver = Driver(runner=runner, kv=kv)
        before_freeze(driver)
        runner.warm_up(max(num_blocks), lambda *_: None)
        yield driver
    finally:
        runner.close()
