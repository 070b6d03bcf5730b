"""x @ weight.T on the CPU: which of torch's products is fastest for how many rows.

Measured with torch 2.13 and MKL on an AVX2 machine of two cores:
    1 row             the matrix-vector product uses one thread; a batch of slices of the weight uses all
    a few rows        weight @ x.T takes half the time of x @ weight.T, or less
    bfloat16 weight   without instructions for it, 4 rows and more take longer than widening the weight, slice by
                      slice in cache, and multiplying in float32
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .scratch import Scratch

FEW_ROWS_ALONE, FEW_ROWS = 4, 8
"""With one thread, and with several."""
WIDEN_FROM = 4
"""Rows from which a bfloat16 weight is widened."""
SLICE_NUMBERS = 2**20
"""Of a weight that are widened at once: 4 MiB, which stay in cache."""

SLICE_STEP = 64
"""Rows that belong together in the widest layout of packed numbers."""

Widen = Callable[[int, Tensor], None]
"""(first row, wide [n, K] f32): fills `wide` with rows first, first + 1, … of a weight."""


class Product:
    """One for all layers, for they share its scratch memory."""

    def __init__(self, *, native_bfloat16: bool, slice_numbers: int = SLICE_NUMBERS) -> None:
        self.native_bfloat16 = native_bfloat16
        self.slice_numbers = slice_numbers
        self._scratch = Scratch()

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """x [T, K], weight [N, K], bias [N] -> [T, N] of `out_dtype`.

        Where that is wider than the weight nothing is rounded on the way: logits in steps of bfloat16, which are 1/8
        near 20, would tie.
        """
        if weight.dtype == torch.float32:
            return multiply(x, weight, bias).to(out_dtype)
        slow = not self.native_bfloat16 and x.shape[0] >= WIDEN_FROM
        if slow or out_dtype == torch.float32:

            def widen(first: int, wide: Tensor) -> None:
                wide.copy_(weight[first : first + len(wide)])

            out = self.widened(x, len(weight), widen, torch.float32)
            return (out if bias is None else out.add_(bias)).to(out_dtype)
        return F.linear(x, weight, bias).to(out_dtype)

    def slice_rows(self, num_columns: int) -> int:
        """Rows of a weight that are widened at once: a multiple of SLICE_STEP."""
        return max(1, self.slice_numbers // num_columns // SLICE_STEP) * SLICE_STEP

    def widened(self, x: Tensor, num_rows: int, widen: Widen, out_dtype: torch.dtype) -> Tensor:
        """x [T, K] -> [T, num_rows]; slices begin at multiples of slice_rows.

        Of float32, unless x, the output and the CPU's own products are of bfloat16.
        """
        native = self.native_bfloat16 and x.dtype == out_dtype == torch.bfloat16
        if not native or len(x) < WIDEN_FROM:
            x = x.float()
        size, outs = self.slice_rows(x.shape[1]), list[Tensor]()
        for first in range(0, num_rows, size):
            shape = (min(size, num_rows - first), x.shape[1])
            wide = self._scratch.take(shape, torch.float32)
            widen(first, wide)
            outs.append(multiply(x, wide.to(x.dtype), None))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, K], [N, K], [N] -> [T, N], all of one dtype."""
    num_rows = x.shape[0]
    num_slices = _even_slices(weight.shape[0]) if num_rows == 1 else 1
    if num_slices > 1:
        slices = weight.view(num_slices, -1, weight.shape[1]).transpose(1, 2)
        out = torch.bmm(x.expand(num_slices, 1, -1), slices).view(1, -1)
    elif 1 < num_rows <= (FEW_ROWS if torch.get_num_threads() > 1 else FEW_ROWS_ALONE):
        out = torch.mm(weight, x.t()).t().contiguous()
    else:
        return F.linear(x, weight, bias)
    return out if bias is None else out.add_(bias)


def _even_slices(num_outputs: int) -> int:
    """At least one a thread, and all equal; 1 where that cannot be."""
    threads = torch.get_num_threads()
    candidates = range(threads, 2 * threads + 1) if threads > 1 else ()
    return next((n for n in candidates if num_outputs % n == 0), 1)
