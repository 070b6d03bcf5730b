"""What a session runs in place of a model: modules that read a value, and that draw from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..kv_cache import Cache
from ..sampler import Sampler
from ..step import StepInputs, StepOutput

Compute = Callable[[Tensor, StepInputs, Cache], tuple[Tensor, Cache]]
"""(token ids [T], inputs, cache) -> (values [T, n], cache): what a model does between feeding and logits."""


class Reader(nn.Module):
    """The "model" of a step whose logits are the values of `compute` at the rows of logits, in float32."""

    def __init__(self, backend: Backend, compute: Compute, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.backend = backend
        self.compute = compute
        for name, tensor in tensors.items():
            self.register_buffer(name, backend.runtime.put(tensor))

    def forward(self, inputs: StepInputs, cache: Cache) -> tuple[Tensor, Cache]:
        """[L, n] f32."""
        ids = self.backend.sampler.feed(inputs, cache)
        values, cache = self.compute(ids, inputs, cache)
        return values.index_select(0, inputs.logit_index).to(torch.float32), cache


class ReadStep(nn.Module):
    """A fused step that draws nothing and gives the reader's values as top_logprobs."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, inputs: StepInputs, cache: Cache) -> tuple[StepOutput, Cache]:
        """The values; ids are all 0."""
        values, cache = self.reader(inputs, cache)
        zeros = inputs.logit_index * 0
        return StepOutput(ids=zeros, finite=zeros + 1, top_logprobs=values), cache


class Draw(nn.Module):
    """The sampler as a module: (StepInputs, Cache, logits) -> (StepOutput, Cache)."""

    def __init__(self, sampler: Sampler) -> None:
        super().__init__()
        self.sampler = sampler

    def forward(self, inputs: StepInputs, cache: Cache, logits: Tensor) -> tuple[StepOutput, Cache]:
        """What the sampler makes of the logits [L, V]."""
        drawn: tuple[StepOutput, Cache] = self.sampler(logits, inputs, cache)
        return drawn


class DrawStep(nn.Module):
    """A fused step that draws from the reader's values."""

    def __init__(self, reader: nn.Module, draw: Draw) -> None:
        super().__init__()
        self.reader, self.draw = reader, draw

    def forward(self, inputs: StepInputs, cache: Cache) -> tuple[StepOutput, Cache]:
        """What the sampler makes of the values."""
        logits, cache = self.reader(inputs, cache)
        drawn: tuple[StepOutput, Cache] = self.draw(inputs, cache, logits)
        return drawn
