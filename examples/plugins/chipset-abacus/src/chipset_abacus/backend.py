"""The worker half: chipset's references, and what the abacus does in its own way."""

from collections.abc import Sequence

import torch
from chipset.backends.attention import AttentionParams
from chipset.backends.kv_cache import Cache
from chipset.backends.options import AttentionSpec
from chipset.backends.plugin import Launch
from chipset.backends.reference.attention import MASKED, ReferenceAttention
from chipset.backends.reference.backend import ReferenceBackend
from chipset.backends.reference.compiler import BucketCompiler
from chipset.backends.reference.operators import OperatorCollectives
from chipset.backends.reference.telemetry import Counting
from chipset.backends.step import DeviceInputs
from torch import Tensor

from .beads import AbacusLinear


class AbacusAttention(Counting, ReferenceAttention):
    """A block of keys at a time, so that no row of scores is ever whole: what was found shrinks where a better turns up.

    After Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867).
    """

    def supports(self, spec: AttentionSpec) -> Sequence[str]:
        """Windows at most."""
        is_served = spec.causal and not (spec.soft_cap or spec.sinks or spec.alibi)
        return [] if is_served else ["only causal attention and sliding windows are served"]

    def attend(
        self,
        layer: int,
        spec: AttentionSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Cache,
        inputs: DeviceInputs,
        params: AttentionParams,
    ) -> tuple[Tensor, Cache]:
        """See Attention.attend."""
        cache = self._write(layer, k, v, cache, inputs[f"slots{spec.group}"], params)
        query_index, end = inputs["query_index"][:, :, None], inputs["context_len"][:, None, None]
        q = q.index_select(0, inputs["gather"].reshape(-1)).float() * spec.scale
        q = q.reshape(*query_index.shape[:2], spec.num_kv_heads, -1, spec.head_size)
        best, total, out = q[..., :1] * 0 + MASKED, q[..., :1] * 0, q[..., :1] * 0
        for number, blocks in enumerate(inputs[f"table{spec.group}"].unbind(1)):
            self.counters["attention_blocks"] += 1
            keys, values = self._read(layer, cache, blocks, params)  # [R, B, Hkv, D]
            index = torch.arange(keys.shape[1], device=q.device) + number * keys.shape[1]
            seen = (index <= query_index) & (index < end) & (index > query_index - (spec.window or 2**30))
            values, seen = torch.where(seen.any(1)[:, :, None, None], values, 0.0), seen[:, :, None, None]
            scores = torch.where(seen, torch.einsum("rqhgd,rbhd->rqhgb", q, keys.float()), MASKED)
            better = torch.maximum(best, scores.amax(-1, keepdim=True))
            shrink, weights = torch.exp(best - better), torch.exp(scores - better) * seen
            total = total * shrink + weights.sum(-1, keepdim=True)
            out, best = out * shrink + torch.einsum("rqhgb,rbhd->rqhgd", weights, values.float()), better
        out = (out / total.clamp(min=1e-30)).reshape(-1, spec.num_heads, spec.value_size)
        return out.index_select(0, inputs["back"]).to(v.dtype), cache


class AbacusCollectives(Counting, OperatorCollectives):
    """Sums in float64, rounded once; a compiler sees the gather and the sum."""

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        """See Collectives.all_reduce."""
        self.counters["sums"] += 1
        return self.all_gather(x[None], group, 0).double().sum(0).to(x.dtype)


class AbacusBackend(ReferenceBackend):
    """One rank."""

    collectives = AbacusCollectives

    def __init__(self, launch: Launch) -> None:
        super().__init__(launch)
        self.attention, self.linear, self.compiler = AbacusAttention(), AbacusLinear(self.runtime), BucketCompiler()
        self.telemetry.give(self.attention, self.linear, self.comm)
