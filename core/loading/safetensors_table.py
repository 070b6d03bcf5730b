"""The head of a safetensors file, checked before the library maps the file.

length of the table u64 | table as JSON: name -> dtype, shape, [start, end] | tensor data
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelFormatError, ModelNotFound

_MAX_TABLE_BYTES = 100_000_000
"""Also the library's own limit."""
_MAX_DIMS = 8
_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A row of the table."""

    name: str
    num_bytes: int


def read_safetensors_table(path: Path) -> Sequence[StoredTensor]:
    """Every tensor in the order of its bytes; raises ModelFormatError, or ModelNotFound if it cannot be opened."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_TABLE_BYTES):
                raise ModelFormatError(
                    f"{path} is cut off or no safetensors file; download it again."
                )
            text = file.read(length)
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror}.") from error
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is corrupt: its table is no JSON.") from error
    if not isinstance(table, dict):
        raise ModelFormatError(f"{path} is corrupt: its table is no JSON object.")
    table.pop("__metadata__", None)
    rows = sorted(_row(path, name, entry) for name, entry in table.items())
    end = 0
    for start, stop, name in rows:
        if start != end:
            raise ModelFormatError(
                f"{path} is corrupt: tensor {name!r} overlaps another or leaves a gap."
            )
        end = stop
    if 8 + length + end != size:
        raise ModelFormatError(
            f"{path} is cut off: its tensors end at byte {8 + length + end}, the file has {size}; download it again."
        )
    return [StoredTensor(name, stop - start) for start, stop, name in rows]


def _row(path: Path, name: str, entry: object) -> tuple[int, int, str]:
    """start, end and name; the size must be what dtype and shape say."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            sizes = [size for size in shape if isinstance(size, int) and size >= 0]
            if dtype not in _BITS:
                raise ModelFormatError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}.")
            fits = math.prod(sizes) * _BITS[dtype] == (end - start) * 8
            if fits and len(sizes) == len(shape) <= _MAX_DIMS and 0 <= start <= end:
                return start, end, name
    raise ModelFormatError(f"{path} is corrupt: the entry of tensor {name!r} is inconsistent.")
