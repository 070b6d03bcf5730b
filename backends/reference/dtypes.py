"""Names of dtypes, as options and specs carry them, to torch's."""

from __future__ import annotations

import torch

from ..errors import PluginError


def torch_dtype(name: str) -> torch.dtype:
    """ "bfloat16" -> torch.bfloat16. Raises PluginError where torch has no dtype of that name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise PluginError(f"torch has no dtype {name!r}; resolve must name one it has")
    return dtype
