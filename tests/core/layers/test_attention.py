from __future__ import annotations

import pytest
import torch
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from chipset.core.layers.attention import alibi_slopes


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 14, 16, 20, 32, 112])
def test_alibi_slopes_are_those_of_transformers(num_heads: int) -> None:
    ours, theirs = alibi_slopes(num_heads), _get_alibi_slopes(num_heads, torch.device("cpu"))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
