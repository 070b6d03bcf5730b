"""Small operations of a model in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PluginError
from ..ops import Ops

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def activate(x: Tensor, activation: str) -> Tensor:
    """One of ACTIVATIONS of x; raises PluginError for another name."""
    match activation:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
    raise PluginError(f"no activation {activation!r}; the contract has {', '.join(ACTIVATIONS)}")


class ReferenceOps(Ops):
    """Every operation of Ops, in as many steps as its definition has."""

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        *,
        offset: float = 0.0,
        weight_in_float: bool = False,
    ) -> Tensor:
        """See Ops.rms_norm."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if weight_in_float:
            return (wide * (weight.float() + offset)).to(x.dtype)
        return wide.to(x.dtype) * (weight + offset)

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        *,
        offset: float = 0.0,
        weight_in_float: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See Ops.add_rms_norm."""
        total = x + residual
        norm = self.rms_norm(total, weight, eps, offset=offset, weight_in_float=weight_in_float)
        return norm, total

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """See Ops.layer_norm."""
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def rope(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See Ops.rope."""
        return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)

    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """See Ops.gated."""
        return activate(gate, activation) * up

    def activation(self, x: Tensor, activation: str) -> Tensor:
        """See Ops.activation."""
        return activate(x, activation)

    def route(self, logits: Tensor, k: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
        """See Ops.route."""
        weights, ids = torch.softmax(logits.float(), -1).topk(k, -1)
        if normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, ids.to(torch.int32)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [T, heads, D]: pairs are (i, i + D'/2), or neighbours where interleaved."""
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size].float(), x[..., size:]
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((out.to(x.dtype), rest), -1)
