"""Weights in a GGUF file: blocks of the formats that are served packed as they are, all others decoded."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ModelFormatError
from .gguf_file import read_gguf
from .gguf_names import WeightPart, weight_parts
from .weight_source import (
    Bytes,
    Part,
    WeightEntry,
    WeightSource,
    decode_plain,
    map_file,
    whole_part,
)

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


class GgufSource(WeightSource):
    """Floats come in their own dtype, blocks whose type is one of `packed` as they are, and others decoded to float32,
    where they are exact.
    """

    def __init__(self, path: Path, packed: Collection[str] = ()) -> None:
        self._parts = {part.name: part for part in weight_parts(read_gguf(path))}
        self._data = map_file(str(path))
        self._packed = frozenset(packed)
        self.weights = {name: self._entry(part) for name, part in self._parts.items()}
        self.ggml_kinds = {
            name.removesuffix(".weight"): part.stored.kind.name
            for name, part in self._parts.items()
            if self._is_packed(part)
        }

    def read(self, name: str, part: Part = ()) -> Tensor:
        """See WeightSource.read."""
        weight = self._parts[name]
        stored = weight.stored
        raw = self._data[stored.offset : stored.offset + stored.num_bytes]
        part = whole_part(self.weights[name].shape, part)
        if stored.kind in _PLAIN and not weight.interleaved_heads:
            tensor = decode_plain(raw, stored.shape, _PLAIN[stored.kind], part)
            self.bytes_read += tensor.nbytes
            return tensor.float() - 1 if weight.plus_one else tensor
        return self._read_rows(weight, raw, part)

    def _read_rows(self, weight: WeightPart, raw: Bytes, part: Part) -> Tensor:
        """Of a matrix that is stored in blocks or with its rows in another order."""
        stored = weight.stored
        block, block_bytes = GGML_QUANT_SIZES[stored.kind]
        cells = raw.reshape(*stored.shape[:-1], stored.shape[-1] // block, block_bytes)
        if weight.interleaved_heads:
            cells = cells[_rotary_rows(stored.shape[0], weight.interleaved_heads)[part[0]]]
            part = (slice(0, cells.shape[0]), *part[1:])
        if self._is_packed(weight):
            cells = np.ascontiguousarray(cells[part])
            self.bytes_read += cells.nbytes
            return torch.from_numpy(cells)
        *outer, last = part
        first = last.start // block
        cells = np.ascontiguousarray(cells[(*outer, slice(first, -(-last.stop // block)))])
        self.bytes_read += cells.nbytes
        shape = (*cells.shape[:-2], cells.shape[-2] * block)
        if stored.kind in _PLAIN:
            tensor = decode_plain(cells.reshape(-1), shape, _PLAIN[stored.kind], ())
        else:
            tensor = torch.from_numpy(_decode_blocks(weight, cells)).view(shape)
        return tensor[..., last.start - first * block : last.stop - first * block]

    def _entry(self, part: WeightPart) -> WeightEntry:
        stored = part.stored
        shape, dtype = stored.shape, "float32"
        if self._is_packed(part):
            block, block_bytes = GGML_QUANT_SIZES[stored.kind]
            shape, dtype = (*shape[:-1], shape[-1] // block, block_bytes), "uint8"
        elif stored.kind in _PLAIN and not part.plus_one:
            dtype = str(_PLAIN[stored.kind]).removeprefix("torch.")
        return WeightEntry(shape=shape, dtype=dtype, num_bytes=stored.num_bytes)

    def _is_packed(self, part: WeightPart) -> bool:
        stored = part.stored
        is_matrix = len(stored.shape) == 2 and part.name.endswith(".weight")
        return is_matrix and not part.plus_one and stored.kind.name in self._packed


def _rotary_rows(num_rows: int, num_heads: int) -> NDArray[np.intp]:
    """Where rows are stored that lie 0, h, 1, h + 1, … in each head's block, h being half of it."""
    stored = np.arange(num_rows).reshape(num_heads, -1, 2)
    return stored.swapaxes(1, 2).reshape(-1)


def _decode_blocks(weight: WeightPart, cells: Bytes) -> NDArray[np.float32]:
    """gguf decodes 16 rows at a time; rows of up to 256 blocks, wherever the tensor's own end, are 3x as fast."""
    kind, block_bytes = weight.stored.kind, cells.shape[-1]
    blocks_per_row = math.gcd(cells.size // block_bytes, 256)
    try:
        # A scale of infinity in the file is the file's affair; numpy would warn of it.
        with np.errstate(all="ignore"):
            return gguf.dequantize(cells.reshape(-1, blocks_per_row * block_bytes), kind)
    except NotImplementedError as error:
        raise ModelFormatError(
            f"{weight.stored.name} is stored as {kind.name}, which cannot be decoded."
        ) from error
