"""Logits of every token of a text that is given, on the CPU backend: in one step for each window, without an engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chipset.backends.formats import Scheme
from chipset.backends.kv_cache import KVPlan
from chipset.backends.options import EngineOptions
from chipset.backends.plugin import Launch, WorkerSpec
from chipset.backends.shapes import Bucket, Phase
from chipset.backends.step import SamplingBatch, StepBatch
from chipset.core.loading.weight_source import WeightSource
from chipset.core.models.build import build_decoder
from chipset.core.models.config import ModelConfig
from chipset.core.models.report import WeightReport
from chipset.core.models.spec import model_spec
from chipset.plugins.cpu.plugin import CPUPlugin


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Of a text."""

    value: float
    num_tokens: int
    """That were scored; the first of a window is not."""


class ForcedModel:
    """Windows of one size, each a prompt of its own."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        scheme: Scheme | None,
        *,
        window: int,
        dtype: str = "float32",
    ) -> None:
        plugin = CPUPlugin()
        capabilities = plugin.capabilities(plugin.probe())
        spec = model_spec(config, dtype=dtype, max_context=window)
        asked = EngineOptions(dtype=dtype, max_batch_rows=1, max_batch_tokens=window)
        options = plugin.resolve(asked, spec, capabilities)
        launch = Launch(
            plugin="cpu",
            worker=WorkerSpec(rank=0, local_rank=0, host=0, devices=(0,)),
            world_size=1,
            rendezvous="",
            groups={"tensor": (0,)},
            capabilities=capabilities,
            options=options,
            model=spec,
            shapes=plugin.shapes(options, spec),
        )
        self.window = window
        self._num_groups = len(spec.groups)
        self._backend = plugin.create(launch)
        self._blocks = -(-window // options.block_size)
        with torch.inference_mode():
            built = build_decoder(config, spec, self._backend, source, scheme=scheme)
            self._step = self._backend.compiler.wrap("model", built.model)
            self._cache = self._backend.kv.allocate(
                [KVPlan(group=group, num_blocks=1 + self._blocks) for group in spec.groups]
            )
        self.report: WeightReport = built.report

    def logits(self, ids: Sequence[int]) -> Tensor:
        """f32 [T, V] of at most `window` ids, each after those before it."""
        count = len(ids)
        batch = StepBatch(
            bucket=Bucket(
                phase=Phase.PREFILL,
                num_rows=1,
                num_tokens=count,
                num_logits=count,
                max_query=count,
                blocks_per_row=self._blocks,
            ),
            num_rows=1,
            num_decode_rows=0,
            num_tokens=count,
            num_logits=count,
            token_ids=np.array(ids, np.int32),
            positions=np.arange(count, dtype=np.int32)[None],
            query_len=np.array([count], np.int32),
            context_len=np.array([count], np.int32),
            row_slot=np.array([0], np.int32),
            block_table=[np.arange(1, 1 + self._blocks, dtype=np.int32)[None]] * self._num_groups,
            logit_index=np.arange(count, dtype=np.int32),
            sampling=SamplingBatch(
                features=frozenset(),
                slot=np.full(count, 1, np.int32),
                position=np.zeros(count, np.int32),
            ),
        )
        with torch.inference_mode():
            logits, self._cache = self._step(self._backend.prepare(batch), self._cache)
        return logits

    def perplexity(self, ids: Sequence[int]) -> Perplexity:
        """Over windows that do not overlap."""
        losses = [self._losses(part) for part in windows(ids, self.window)]
        total = torch.cat(losses)
        return Perplexity(value=math.exp(total.mean().item()), num_tokens=len(total))

    def _losses(self, ids: Sequence[int]) -> Tensor:
        """f64 [T - 1]"""
        logits = self.logits(ids)[:-1]
        wanted = torch.tensor(ids[1:])
        return torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double()

    def close(self) -> None:
        """Let the backend go."""
        self._backend.close()


def windows(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Whole ones."""
    return (ids[first : first + size] for first in range(0, len(ids) - size + 1, size))
