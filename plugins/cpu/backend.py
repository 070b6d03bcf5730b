"""The worker half: the torch references, and what is faster here in their place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...backends.backend import Backend
from ...backends.plugin import Launch
from ...backends.reference.collectives import RankCollectives
from ...backends.reference.compiler import EagerCompiler
from ...backends.reference.staging import sampling_arrays
from ...backends.step import F32, I32, StepBatch, StepInputs
from .attention import CPUAttention
from .collectives import join
from .cpuinfo import architecture, multiplies_bfloat16
from .kv_cache import CPUKVCache
from .ops import CPUOps
from .product import Product
from .quantization import CPULinear
from .rows import AttentionInputs
from .runtime import CPURuntime
from .sampler import CPUSampler
from .threads import num_threads


class CPUBackend(Backend):
    """One process on all the cores it may use."""

    def __init__(self, launch: Launch) -> None:
        torch.set_num_threads(num_threads())
        self.block_size = launch.options.block_size
        self.runtime = CPURuntime()
        self.kv = CPUKVCache(self.runtime, launch)
        self.attention = CPUAttention()
        product = Product(native_bfloat16=multiplies_bfloat16(architecture()))
        self.linear = CPULinear(self.runtime, product)
        self.ops = CPUOps()
        self.comm: RankCollectives = join(launch)
        self.compiler = EagerCompiler(unpack=lambda inputs: inputs)
        self.sampler = CPUSampler(launch.options.max_logprobs)

    def prepare(self, batch: StepBatch) -> StepInputs:
        """Nothing is copied: the tensors are views of the batch's arrays."""
        token_slot = batch.token_slot
        return StepInputs(
            bucket=batch.bucket,
            features=batch.sampling.features,
            token_ids=torch.from_numpy(batch.token_ids),
            positions=torch.from_numpy(batch.positions),
            logit_index=torch.from_numpy(batch.logit_index),
            token_slot=None if token_slot is None else torch.from_numpy(token_slot),
            attention=AttentionInputs(batch, self.block_size),
            sampling=_tensors(sampling_arrays(batch.sampling)),
        )

    def close(self) -> None:
        """See Backend.close."""
        self.comm.close()


def _tensors(arrays: Mapping[str, I32 | F32]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
