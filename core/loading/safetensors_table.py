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
DTYPES: Mapping[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
"""Torch's names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """A tensor and where it lies."""

    name: str
    dtype: str
    """A key of DTYPES."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


def read_safetensors_table(path: Path) -> Sequence[TableRow]:
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
    rows = [_row(path, name, entry, 8 + length) for name, entry in table.items()]
    rows.sort(key=lambda row: (row.offset, row.num_bytes))
    end = 8 + length
    for row in rows:
        if row.offset != end:
            raise ModelFormatError(
                f"{path} is corrupt: tensor {row.name!r} overlaps another or leaves a gap."
            )
        end += row.num_bytes
    if end != size:
        raise ModelFormatError(
            f"{path} is cut off: its tensors end at byte {end}, the file has {size}; download it again."
        )
    return rows


def _row(path: Path, name: str, entry: object, base: int) -> TableRow:
    """`base`: where the data begins. The size must be what dtype and shape say."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            sizes = tuple(size for size in shape if isinstance(size, int) and size >= 0)
            if dtype not in DTYPES:
                raise ModelFormatError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}.")
            fits = math.prod(sizes) * _itemsize(dtype) == end - start
            if fits and len(sizes) == len(shape) <= _MAX_DIMS and 0 <= start <= end:
                return TableRow(
                    name=name, dtype=dtype, shape=sizes, offset=base + start, num_bytes=end - start
                )
    raise ModelFormatError(f"{path} is corrupt: the entry of tensor {name!r} is inconsistent.")


def _itemsize(dtype: str) -> int:
    """Bytes; the digits of a name say its bits."""
    digits = "".join(filter(str.isdigit, dtype.partition("_")[0]))
    return int(digits) // 8 if digits else 1
