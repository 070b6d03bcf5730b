"""Memory that is used again: fresh pages from the kernel cost more than what is computed in them."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Scratch:
    """One buffer, as large as the largest tensor that was asked of it."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of unknown content; what was taken before is lost."""
        size = prod(shape) * dtype.itemsize
        if size > self._bytes.numel():
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype).view(shape)
