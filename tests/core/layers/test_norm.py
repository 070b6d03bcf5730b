from __future__ import annotations

import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from chipset.backends.reference.ops import ReferenceOps
from chipset.core.layers.norm import LayerNorm, RMSNorm


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_the_weight_multiplies_before_rounding_in_gemma_and_after_it_in_llama() -> None:
    x, weight = draw(200, 64), draw(64)
    llama = LlamaRMSNorm(64, eps=1e-6)
    gemma = Gemma3RMSNorm(64, eps=1e-6)
    ours = [
        RMSNorm(ReferenceOps(), weight, 1e-6, offset=offset, weight_in_float=in_float)
        for offset, in_float in ((0.0, False), (1.0, True), (1.0, False))
    ]
    with torch.no_grad():
        llama.weight.copy_(weight)
        llama.bfloat16()
        gemma.weight.copy_(weight)
        gemma.bfloat16()
        assert torch.equal(ours[0](x), llama(x))
        assert torch.equal(ours[1](x), gemma(x))
        assert not torch.equal(ours[2](x), gemma(x))


def test_adding_first_is_the_norm_of_the_sum() -> None:
    x, residual, weight = draw(9, 32), draw(9, 32) * 3, draw(32)
    norms = (
        RMSNorm(ReferenceOps(), weight, 1e-6, offset=1.0, weight_in_float=True),
        LayerNorm(ReferenceOps(), weight, weight * 2, 1e-6),
    )
    for norm in norms:
        normed, total = norm.add(x, residual)
        assert torch.equal(total, x + residual)
        assert torch.equal(normed, norm(x + residual))
