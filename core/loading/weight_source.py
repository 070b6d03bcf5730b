"""The weights of a model as named tensors of which any part can be read alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes: TypeAlias = NDArray[np.uint8]
Part: TypeAlias = tuple[slice, ...]
"""Of the first axes of a tensor, with a step of 1; the rest is whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightEntry:
    """A tensor, before it is read."""

    shape: tuple[int, ...]
    dtype: str
    """That it is read in, by torch's name."""
    num_bytes: int
    """In the file."""


class WeightSource(ABC):
    """Nothing is read of a file but its head until `read` asks for it."""

    weights: Mapping[str, WeightEntry]
    """By name, in Transformers' words, in the order of the files."""
    ggml_kinds: Mapping[str, str] = MappingProxyType({})
    """Type of the blocks of layers (names without `.weight`) that are read as they lie in a GGUF file: u8 [N, K / size
    of a block, bytes of a block].
    """
    bytes_read: int = 0
    """Of weights, so far."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all weights."""
        return tuple(self.weights)

    @abstractmethod
    def read(self, name: str, part: Part = ()) -> Tensor:
        """A part of a weight, on the host. It may be a view of the file's pages: copy what is to stay."""


def map_file(path: str) -> Bytes:
    """All bytes of a file, read as they are looked at. What is written to them stays in this process."""
    return np.memmap(path, mode="c", dtype=np.uint8).view(np.ndarray)


def whole_part(shape: tuple[int, ...], part: Part) -> Part:
    """`part` with all axes and both ends."""
    missing = (slice(None),) * (len(shape) - len(part))
    return tuple(
        slice(*axis.indices(size)) for axis, size in zip((*part, *missing), shape, strict=True)
    )


def decode_plain(raw: Bytes, shape: tuple[int, ...], dtype: torch.dtype, part: Part) -> Tensor:
    """Part of a tensor whose bytes are `raw`; a view of them where they lie together and aligned."""
    if not shape:
        return decode_plain(raw, (1,), dtype, ()).reshape(())
    size = dtype.itemsize
    *outer, last = whole_part(shape, part)
    cells = raw.reshape(*shape[:-1], shape[-1] * size)
    cells = np.ascontiguousarray(cells[(*outer, slice(last.start * size, last.stop * size))])
    if cells.ctypes.data % size:
        cells = cells.copy()
    return torch.from_numpy(cells).view(dtype)
