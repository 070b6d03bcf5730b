"""Operations of a model on the CPU: as few passes and calls as torch allows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.reference.ops import ReferenceOps


class CPUOps(ReferenceOps):
    """Torch's fused norm where it rounds as the contract says, and one rotation for q and k."""

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        *,
        offset: float = 0.0,
        weight_in_float: bool = False,
    ) -> Tensor:
        """See Ops.rms_norm: the fused one multiplies by the weight in float32 before it rounds."""
        if x.dtype != torch.float32 and not weight_in_float:
            return super().rms_norm(x, weight, eps, offset=offset)
        if offset:
            weight = weight.float() + offset
        return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)

    def rope(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See Ops.rope."""
        both = torch.cat((q, k), 1)
        out, _ = super().rope(both, both[:, :0], cos, sin, interleaved=interleaved)
        return out[:, : q.shape[1]], out[:, q.shape[1] :]
