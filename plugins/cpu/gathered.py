"""Keys or values that a part of a step attends to, taken out of the cache and made numbers to compute with."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.reference.kv_numbers import is_float8
from .rows import Part
from .scratch import Scratch


class Gathered:
    """Buffers for what `take` returns; one for keys and one for values."""

    def __init__(self) -> None:
        self._held = Scratch()
        self._wide = Scratch()
        self._bits = Scratch()

    def take(self, slots: Tensor, scales: Tensor | None, part: Part, dtype: torch.dtype) -> Tensor:
        """Of token slots [N, H, D] and their scales [N, H] those of `part`: [R, S, H, D] of `dtype`.

        float8 is not yet times its layer's scale. The next call overwrites the result.
        """
        flat = slots.flatten(1)
        held = self._held.take((len(part.slots), flat.shape[1]), slots.dtype)
        torch.index_select(flat, 0, part.slots, out=held)
        found = held.view(*part.key_index.shape, *slots.shape[1:])
        if scales is not None:
            wide = self._wide.take(found.shape, dtype).copy_(found)
            return wide.mul_(scales.index_select(0, part.slots).view(*found.shape[:-1], 1))
        if is_float8(slots.dtype):
            return self._widen_float8(found, dtype)
        return found.to(dtype)

    def _widen_float8(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """As torch does, ten times as fast: the same bits, moved up, are a float16.

        e5m2   s eeeee mm      s eeeee mm 00000000     the same number, or the same infinity or nan
        e4m3   s eeee mmm      s 0eeee mmm 0000000     times 2**-8, for 15 - 7; but all ones are a nan
        """
        wide = self._wide.take(numbers.shape, dtype)
        bytes_ = numbers.view(torch.int8)
        bits = self._bits.take(numbers.shape, torch.int16).copy_(bytes_)
        if numbers.dtype == torch.float8_e5m2:
            return wide.copy_(bits.bitwise_left_shift_(8).view(torch.float16))
        # the numbers are finite as written, but for those of a model that gives nan
        if bool((bytes_.bitwise_and(0x7F) == 0x7F).any()):
            return wide.copy_(numbers)
        # widening repeated the sign, so that bit 14 has it too
        bits.bitwise_left_shift_(7).bitwise_and_(~0x4000)
        return wide.copy_(bits.view(torch.float16)).mul_(256.0)
