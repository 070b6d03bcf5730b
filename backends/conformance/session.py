"""A backend with a cache, driven step by step as the core would, without a core and without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backend import check_members
from ..errors import TooLarge
from ..kv_cache import Cache, KVBlob, KVPlan
from ..options import EngineOptions, ModelSpec
from ..plugin import Launch, Plugin
from ..runtime import Pending
from ..shapes import BatchShape, Bucket, Phase
from ..step import F32, I32, Prepared, StepBatch, StepInputs, StepOutput
from .blobs import filled_blob, tokens
from .modules import Compute, Draw, DrawStep, Reader, ReadStep
from .rows import Logits, Row, build_batch, padded
from .watch import Watch


class Session:
    """One backend made by `plugin` for `model`, and its cache of `num_blocks` blocks a KV group.

    `launch` says what it is told; without, it is that of the first worker (see make_launch).
    """

    def __init__(
        self,
        plugin: Plugin,
        model: ModelSpec,
        options: EngineOptions | None = None,
        *,
        num_blocks: int = 32,
        launch: Launch | None = None,
    ) -> None:
        self.launch = launch or make_launch(plugin, model, options or EngineOptions())
        self.num_blocks = num_blocks
        self.backend = plugin.create(self.launch)
        check_members(self.backend)
        self.watch = Watch(self.backend)
        self._wrapped: dict[tuple[str, int], tuple[nn.Module, Callable[..., Any]]] = {}
        self.plans = [KVPlan(group=group, num_blocks=num_blocks) for group in model.groups]
        self.cache: Cache = None
        self.renew()

    @property
    def block_size(self) -> int:
        """Tokens a block holds."""
        return self.launch.options.block_size

    def close(self) -> None:
        """Free the cache and leave the device."""
        if self.cache is not None:
            self.backend.kv.free(self.cache)
            self.cache = None
        self.backend.close()

    def reader(self, compute: Compute, tensors: Mapping[str, Tensor]) -> Reader:
        """A module to hand to `read` or `draw`, with `tensors` on the device as its buffers."""
        with torch.inference_mode():
            return Reader(self.backend, compute, tensors)

    def table(self, values: Tensor) -> Reader:
        """A reader whose values for token i are row i of `values` [V, n]."""
        reader: Reader

        def look_up(ids: Tensor, inputs: StepInputs, cache: Cache) -> tuple[Tensor, Cache]:  # noqa: ARG001
            found: Tensor = reader.get_buffer("values").index_select(0, ids)
            return found, cache

        reader = self.reader(look_up, {"values": values})
        return reader

    def fit(self, rows: Sequence[Row], logits: Logits = "last") -> Bucket:
        """What the plugin's ShapePolicy makes of these rows. Raises TooLarge."""
        return self.launch.shapes.fit(self.shape(rows, logits))

    def shape(self, rows: Sequence[Row], logits: Logits = "last") -> BatchShape:
        """The true sizes of a step of `rows`."""
        kinds = {row.is_decode for row in rows}
        phase = (
            Phase.MIXED if len(kinds) == 2 else Phase.DECODE if kinds == {True} else Phase.PREFILL
        )
        num_tokens = sum(len(row.token_ids) for row in rows)
        return BatchShape(
            phase=phase,
            num_rows=len(rows),
            num_tokens=num_tokens,
            num_logits={"last": len(rows), "all": num_tokens, "none": 0}[logits],
            max_query=max(len(row.token_ids) for row in rows),
            max_context=max(row.end for row in rows),
            max_computed=max(row.start for row in rows),
            num_blocks=sum(-(-row.end // self.block_size) for row in rows),
            max_block=max(max(blocks) for row in rows for blocks in row.blocks),
        )

    def can_hold(self, rows: Sequence[Row], logits: Logits = "last") -> bool:
        """Whether policy and buckets take these rows in one step."""
        policy, decodes = self.launch.shapes.batch, [row.is_decode for row in rows]
        if any(decodes) and not all(decodes) and not policy.mixed:
            return False
        if policy.max_prefills is not None and decodes.count(False) > policy.max_prefills:
            return False
        try:
            self.fit(rows, logits)
        except TooLarge:
            return False
        return len(rows) <= policy.max_rows and self.shape(rows).num_tokens <= policy.max_tokens

    def batch(
        self,
        rows: Sequence[Row],
        *,
        logits: Logits = "last",
        features: frozenset[str] = frozenset(),
        sampling: Mapping[str, I32 | F32] | None = None,
        bucket: Bucket | None = None,
    ) -> StepBatch:
        """The step of `rows`, decode rows first; `sampling` replaces neutral values, true rows of logits first."""
        return build_batch(
            self.launch, rows, bucket or self.fit(rows, logits), logits, features, sampling or {}
        )

    def read(self, reader: Reader, batch: StepBatch) -> F32:
        """One step: the reader's values [num_logits, n] at the rows of logits."""
        with torch.inference_mode():
            prepared = self.backend.prepare(batch)
            if self.launch.capabilities.fused_draw:
                step = self._wrap("step", reader, lambda: ReadStep(reader))
                output, self.cache = step(prepared, self.cache)
            else:
                values = self._model(reader, prepared)
                zeros = self.backend.runtime.put(torch.zeros(values.shape[0], dtype=torch.int32))
                output = StepOutput(ids=zeros, finite=zeros, top_logprobs=values)
            pending: Pending[StepOutput] = self.backend.runtime.fetch(output)
            return np.array(pending.result().top_logprobs)[: batch.num_logits]

    def draw(self, reader: Reader, batch: StepBatch) -> StepOutput:
        """One step: what the sampler makes of the reader's values as logits; numpy arrays, cut to num_logits."""
        fetched = self.start(reader, batch).result()
        fields = StepOutput.__dataclass_fields__
        arrays = {name: getattr(fetched, name) for name in fields}
        return StepOutput(
            **{n: None if a is None else np.array(a)[: batch.num_logits] for n, a in arrays.items()}  # type: ignore[arg-type]
        )

    def start(self, reader: Reader, batch: StepBatch) -> Pending[StepOutput]:
        """`draw`, not waited for."""
        with torch.inference_mode():
            prepared = self.backend.prepare(batch)
            if self.launch.capabilities.fused_draw:
                output = self._step(reader, prepared)
            else:
                values = self._model(reader, prepared)
                draw = self._wrap("draw", self.backend.sampler, lambda: Draw(self.backend.sampler))
                output, self.cache = draw(prepared, self.cache, values)
            return self.backend.runtime.fetch(output)

    def run(self, reader: Reader, batch: StepBatch) -> None:
        """One step of which nothing is fetched: only the cache changes."""
        with torch.inference_mode():
            prepared = self.backend.prepare(batch)
            if self.launch.capabilities.fused_draw:
                self._step(reader, prepared)
            else:
                self._model(reader, prepared)

    def renew(self) -> None:
        """Free the cache and allocate another."""
        with torch.inference_mode():
            if self.cache is not None:
                self.backend.kv.free(self.cache)
                self.cache = None
            self.cache = self.backend.kv.allocate(self.plans)

    def fill(self, value: float) -> None:
        """Every number of every group, the null block's too, is worth `value`."""
        for group in range(len(self.plans)):
            self.overwrite(group, range(self.num_blocks), value)

    def overwrite(self, group: int, blocks: Sequence[int], value: float) -> None:
        """Each number of `blocks` is worth `value`."""
        held = self.launch.model.groups[group]
        for first in range(0, len(blocks), 64):
            ids = padded(blocks[first : first + 64])
            blob = filled_blob(held, ids.size * self.block_size, value)
            with torch.inference_mode():
                self.cache = self.backend.kv.import_blocks(self.cache, group, ids, blob)

    def export(self, group: int, blocks: Sequence[int]) -> KVBlob:
        """The tokens of `blocks`, exactly."""
        with torch.inference_mode():
            found = self.backend.kv.export_blocks(self.cache, group, padded(blocks)).result()
        return tokens(found, 0, len(blocks) * self.block_size)

    def _model(self, reader: Reader, prepared: Prepared) -> Tensor:
        model = self._wrap("model", reader, lambda: reader)
        values: Tensor
        values, self.cache = model(prepared, self.cache)
        return values

    def _step(self, reader: Reader, prepared: Prepared) -> StepOutput:
        draw = Draw(self.backend.sampler)
        step = self._wrap("draw", reader, lambda: DrawStep(reader, draw), name="step")
        output: StepOutput
        output, self.cache = step(prepared, self.cache)
        return output

    def _wrap(
        self, kind: str, owner: object, make: Callable[[], nn.Module], name: str | None = None
    ) -> Callable[..., Any]:
        key = (kind, id(owner))
        if key not in self._wrapped:
            module = make().eval()
            self._wrapped[key] = (module, self.backend.compiler.wrap(name or kind, module))
        return self._wrapped[key][1]


def make_launch(
    plugin: Plugin,
    model: ModelSpec,
    options: EngineOptions,
    *,
    rank: int = 0,
    rendezvous: str = "",
) -> Launch:
    """What the engine process would send to a worker; `rendezvous` is for plans of several."""
    probe = plugin.probe()
    capabilities = plugin.capabilities(probe)
    resolved = plugin.resolve(options, model, capabilities)
    plan = plugin.worker_plan(options.parallel, [probe])
    return Launch(
        plugin=plugin.info.name,
        worker=plan[rank],
        world_size=len(plan),
        rendezvous=rendezvous,
        groups={"tensor": tuple(range(len(plan)))},
        capabilities=capabilities,
        options=resolved,
        model=model,
        shapes=plugin.shapes(resolved, model),
    )
