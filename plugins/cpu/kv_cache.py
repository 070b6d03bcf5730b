"""The KV cache in host memory: how much of what is left it may have."""

from __future__ import annotations

from collections.abc import Callable

from ...backends.options import KVGroup
from ...backends.reference.dtypes import torch_dtype
from ...backends.reference.kv_cache import ReferenceKVCache

FLOAT_BYTES = 4
ACTIVATIONS = 32
"""Hidden-sized rows a token has at once at most: the residual, q, k, v, and an MLP of a few times the hidden size."""
LOGIT_COPIES = 10
"""Vocabulary-sized rows a drawn token has at once at most: filters sort, with indices, and keep what they sorted."""
FAIR_SHARE = 4 * 2**30
"""Bytes that the cache takes unasked: a host's memory is not the server's alone. --kv-cache-memory asks for more."""


class CPUKVCache(ReferenceKVCache):
    """Plain tensors, written in place."""

    def budget(self, utilisation: float, largest_step: Callable[[], None] | None) -> int:  # noqa: ARG002
        """`utilisation` of the memory that is left, less the slots and an upper estimate of the largest step.

        No more than FAIR_SHARE over all ranks, or one text of the longest context where that is more.
        """
        memory, ranks = self.runtime.memory(), self.launch.world_size
        # all ranks may be on this host, and all look at what is free at the same time
        free = 0 if memory is None else memory.free // ranks
        left = int(utilisation * free) - self.slot_bytes - self.step_bytes
        return max(0, min(left, max(FAIR_SHARE // ranks, self.text_bytes)))

    @property
    def text_bytes(self) -> int:
        """What one text of the longest context takes, and the null block."""
        options = self.launch.options
        num_blocks = 1 + -(-options.max_context // options.block_size)
        return num_blocks * sum(map(self.block_bytes, self.launch.model.groups))

    @property
    def step_bytes(self) -> int:
        """At most what the largest step takes beside weights and cache."""
        options, model = self.launch.options, self.launch.model
        tokens, context = options.max_batch_tokens, options.max_context
        activations = tokens * model.hidden_size * ACTIVATIONS
        logits = options.max_batch_rows * model.vocab_size * LOGIT_COPIES
        mask = 2 * tokens * context
        gathered = context * max(map(_gathered_bytes, model.groups), default=0)
        return FLOAT_BYTES * (activations + logits + mask) + gathered


def _gathered_bytes(group: KVGroup) -> int:
    """Of a token's keys and values in one layer: as the cache holds them, and as they are computed with."""
    numbers = group.num_kv_heads * (group.head_size + group.value_size)
    return numbers * (torch_dtype(group.dtype).itemsize + FLOAT_BYTES)
