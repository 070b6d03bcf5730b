"""Operations that are a little wrong, or round elsewhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chipset.backends.reference.ops import ReferenceOps, activate

from ..mutation import Mutation
from ..reference_plugin import ReferencePlugin


class NormInNarrow(ReferenceOps):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, **how: Any) -> Tensor:
        root = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x * root * (weight + how.get("offset", 0.0))


class RoundsAfterTheWeight(ReferenceOps):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, **how: Any) -> Tensor:
        return super().rms_norm(x, weight, eps, **{**how, "weight_in_float": True})


class RoundsBeforeTheWeight(ReferenceOps):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, **how: Any) -> Tensor:
        return super().rms_norm(x, weight, eps, **{**how, "weight_in_float": False})


class OffsetIgnored(ReferenceOps):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, **how: Any) -> Tensor:
        return super().rms_norm(x, weight, eps, **{**how, "offset": 0.0})


class EpsIgnored(ReferenceOps):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, **how: Any) -> Tensor:
        return super().rms_norm(x, weight, 1e-12, **how)


class NormOfAllHeads(ReferenceOps):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, **how: Any) -> Tensor:
        if x.dim() < 3:
            return super().rms_norm(x, weight, eps, **how)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean((1, 2), keepdim=True) + eps)
        return wide.to(x.dtype) * weight


class SumInPlace(ReferenceOps):
    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, **how: Any
    ) -> tuple[Tensor, Tensor]:
        residual.add_(x)
        return self.rms_norm(residual, weight, eps, **how), residual


class SumForgotten(ReferenceOps):
    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, **how: Any
    ) -> tuple[Tensor, Tensor]:
        return super().add_rms_norm(x, residual, weight, eps, **how)[0], residual


class SampleDeviation(ReferenceOps):
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        wide = x.float()
        wide = (wide - wide.mean(-1, keepdim=True)) * torch.rsqrt(
            wide.var(-1, keepdim=True, unbiased=True) + eps
        )
        out = wide * weight.float()
        return (out if bias is None else out + bias.float()).to(x.dtype)


class RopeStylesSwapped(ReferenceOps):
    def rope(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        return super().rope(q, k, cos, sin, interleaved=not interleaved)


class RopeBackwards(ReferenceOps):
    def rope(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        return super().rope(q, k, cos, -sin, interleaved=interleaved)


class RopePairsOverTheHead(ReferenceOps):
    def rope(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        spare = q.shape[-1] // 2 - cos.shape[-1]
        cos, sin = F.pad(cos, (0, spare), value=1.0), F.pad(sin, (0, spare))
        return super().rope(q, k, cos, sin, interleaved=interleaved)


class RopeInNarrow(ReferenceOps):
    def rope(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        narrow = (cos.to(q.dtype).float(), sin.to(q.dtype).float())
        return super().rope(q, k, *narrow, interleaved=interleaved)


class RopeInPlace(ReferenceOps):
    def rope(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        turned = super().rope(q, k, cos, sin, interleaved=interleaved)
        return q.copy_(turned[0]), k.copy_(turned[1])


class TanhForgotten(ReferenceOps):
    def activation(self, x: Tensor, activation: str) -> Tensor:
        return activate(x, "silu" if activation == "gelu_tanh" else activation)


class UpActivated(ReferenceOps):
    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return super().gated(up, gate, activation)


class GateInPlace(ReferenceOps):
    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return gate.copy_(activate(gate, activation)).mul_(up)


class AlwaysNormalised(ReferenceOps):
    def route(self, logits: Tensor, k: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
        return super().route(logits, k, normalise=True)


class NeverNormalised(ReferenceOps):
    def route(self, logits: Tensor, k: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
        return super().route(logits, k, normalise=False)


class SigmoidRouting(ReferenceOps):
    def route(self, logits: Tensor, k: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
        weights, ids = torch.sigmoid(logits.float()).topk(k, -1)
        if normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, ids.to(torch.int32)


def _mutation(name: str, mistake: str, ops: type[ReferenceOps]) -> Mutation:
    return Mutation(name=name, area="ops", mistake=mistake, plugin=lambda: ReferencePlugin(ops=ops))


MUTATIONS: tuple[Mutation, ...] = (
    _mutation("norm in the narrow dtype", "mean squares are sums of bfloat16", NormInNarrow),
    _mutation(
        "norm rounds after the weight",
        "Llama's norm is rounded once, as Gemma's is",
        RoundsAfterTheWeight,
    ),
    _mutation(
        "norm rounds before the weight",
        "Gemma's norm is rounded twice, as Llama's is",
        RoundsBeforeTheWeight,
    ),
    _mutation("norm offset ignored", "x is scaled by w where 1 + w is due", OffsetIgnored),
    _mutation("norm eps ignored", "rows near zero are blown up", EpsIgnored),
    _mutation("norm of all heads", "a head's norm is that of all heads together", NormOfAllHeads),
    _mutation("sum in place", "the caller's residual is overwritten", SumInPlace),
    _mutation("sum forgotten", "the residual comes back without x", SumForgotten),
    _mutation("sample deviation", "variance is over n - 1 numbers", SampleDeviation),
    _mutation("rope styles swapped", "neighbours turn where halves are due", RopeStylesSwapped),
    _mutation("rope backwards", "pairs turn the other way", RopeBackwards),
    _mutation(
        "rope pairs over the head",
        "a partial rotation pairs numbers half a head apart",
        RopePairsOverTheHead,
    ),
    _mutation("rope in the narrow dtype", "cos and sin are bfloat16", RopeInNarrow),
    _mutation("rope in place", "the caller's q and k are overwritten", RopeInPlace),
    _mutation("silu for gelu_tanh", "one activation stands in for another", TanhForgotten),
    _mutation("up activated", "the activation is of up, not of the gate", UpActivated),
    _mutation("gate in place", "the caller's gate is overwritten", GateInPlace),
    _mutation("always normalised", "chosen experts' weights always add up to 1", AlwaysNormalised),
    _mutation("never normalised", "chosen experts' weights never add up to 1", NeverNormalised),
    _mutation("sigmoid routing", "weights are no shares of all experts", SigmoidRouting),
)
