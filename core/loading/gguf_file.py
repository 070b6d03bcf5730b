"""Read the head of a GGUF file: metadata and where its tensors lie, every number checked before use.

    "GGUF" | version u32 | number of tensors u64 | number of keys u64
    keys:    name, type u32, value …
    tensors: name, number of dims u32, dims u64 …, type u32, offset u64 …
    padding to general.alignment | tensor data

Whatever the bytes are, reading ends in a GgufFile whose tensors lie inside the file, or in one ModelFormatError,
in time and memory linear in the file's size. Layout: the GGUF specification of the ggml project, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ..errors import ModelFormatError, ModelNotFound

Value: TypeAlias = "int | float | bool | str | list[str] | array[int] | array[float]"

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_DIMS = 4
_MAX_NAME_BYTES = 1 << 16
_MIN_KEY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies in its file and how it is stored."""

    name: str
    shape: tuple[int, ...]
    """Row-major: the last dimension is contiguous."""
    kind: GGMLQuantizationType
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Metadata and tensor table; the tensors' bytes stay in the file."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]

    def text(self, key: str, default: str | None = None) -> str:
        """A string; ModelFormatError if it is no string, or absent without a default."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise ModelFormatError(
                f"{self.path}: {key} is {_describe(value)} where a string belongs."
            )
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; ModelFormatError if it is none, or absent without a default."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelFormatError(
                f"{self.path}: {key} is {_describe(value)} where a whole number belongs."
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; ModelFormatError if it is none, or absent without a default."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelFormatError(
                f"{self.path}: {key} is {_describe(value)} where a number belongs."
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A truth value; ModelFormatError if it is none."""
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise ModelFormatError(
                f"{self.path}: {key} is {_describe(value)} where true or false belongs."
            )
        return value

    def strings(self, key: str) -> list[str]:
        """An array of strings; ModelFormatError if it is absent or another kind."""
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise ModelFormatError(
                f"{self.path}: {key} is {_describe(value)} where strings belong."
            )
        return value

    def numbers(self, key: str, default: array[int] | None = None) -> array[int] | array[float]:
        """An array of numbers; ModelFormatError if it is another kind, or absent without a default."""
        value = self.metadata.get(key, default)
        if not isinstance(value, array):
            raise ModelFormatError(
                f"{self.path}: {key} is {_describe(value)} where numbers belong."
            )
        return value


def read_gguf(path: Path) -> GgufFile:
    """Metadata and tensor table of a file; raises ModelFormatError, or ModelNotFound if it cannot be opened."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise ModelFormatError(f"{path} is cut off or no GGUF file: it has {size} bytes.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Walker(path, data).read()
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror}.") from error


def _describe(value: object) -> str:
    return "absent" if value is None else f"of type {type(value).__name__}"


class _Walker:
    """A position in the file; every read is checked against the bytes that are left."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0

    def read(self) -> GgufFile:
        if self._data[:4] != b"GGUF":
            raise ModelFormatError(f"{self._path} is no GGUF file: it begins with other bytes.")
        self._at = 4
        version = self._unsigned(4)
        if version not in (2, 3):
            what = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise self._corrupt(f"it is {what}; versions 2 and 3, little-endian, can be read")
        num_tensors, num_keys = self._unsigned(8), self._unsigned(8)
        self._check_count("tensors", num_tensors, _MIN_TENSOR_BYTES)
        self._check_count("keys", num_keys, _MIN_KEY_BYTES)
        metadata: dict[str, Value] = {}
        for _ in range(num_keys):
            key = self._name()
            if key in metadata:
                raise self._corrupt(f"key {key!r} occurs twice")
            metadata[key] = self._value(self._unsigned(4))
        table = [self._tensor() for _ in range(num_tensors)]
        return GgufFile(self._path, metadata, self._place(table, self._alignment(metadata)))

    def _alignment(self, metadata: Mapping[str, Value]) -> int:
        value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
            raise self._corrupt("general.alignment is no power of two")
        return value

    def _place(self, table: list[GgufTensor], alignment: int) -> dict[str, GgufTensor]:
        """Make offsets absolute; check that the tensors lie apart, aligned, inside the file."""
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        end_of_last = 0
        for tensor in sorted(table, key=lambda tensor: tensor.offset):
            if tensor.name in tensors:
                raise self._corrupt(f"tensor {tensor.name!r} occurs twice")
            if tensor.offset % alignment:
                raise self._corrupt(f"tensor {tensor.name!r} is not aligned to {alignment} bytes")
            if tensor.offset < end_of_last:
                raise self._corrupt(f"tensor {tensor.name!r} overlaps another")
            end_of_last = tensor.offset + tensor.num_bytes
            if start + end_of_last > self._size:
                raise ModelFormatError(
                    f"{self._path} is cut off: tensor {tensor.name!r} ends at byte {start + end_of_last}, "
                    f"the file has {self._size}; download it again."
                )
            tensors[tensor.name] = GgufTensor(
                tensor.name, tensor.shape, tensor.kind, start + tensor.offset, tensor.num_bytes
            )
        return {tensor.name: tensors[tensor.name] for tensor in table}

    def _tensor(self) -> GgufTensor:
        name = self._name()
        num_dims = self._unsigned(4)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._corrupt(f"tensor {name!r} has {num_dims} dimensions")
        shape = tuple(self._unsigned(8) for _ in range(num_dims))[::-1]
        number = self._unsigned(4)
        offset = self._unsigned(8)
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise self._corrupt(f"tensor {name!r} has the unknown type {number}") from error
        if 0 in shape or shape[-1] % block:
            raise self._corrupt(
                f"tensor {name!r} of type {kind.name} cannot have the shape {shape}"
            )
        num_bytes = math.prod(shape) // block * block_bytes
        if num_bytes > self._size:
            raise self._corrupt(f"tensor {name!r} is larger than the file")
        return GgufTensor(name, shape, kind, offset, num_bytes)

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string(self._size)
        if kind == _ARRAY:
            return self._array(self._unsigned(4), self._unsigned(8))
        if kind not in _SCALARS:
            raise self._corrupt(f"a value has the unknown type {kind}")
        code = "<" + _SCALARS[kind]
        (value,) = struct.unpack(code, self._bytes(struct.calcsize(code)))
        return bool(value) if kind == _BOOL else value

    def _array(self, kind: int, length: int) -> Value:
        if kind == _STRING:
            self._check_count("strings of an array", length, 8)
            return [self._string(self._size) for _ in range(length)]
        if kind not in _SCALARS:
            raise self._corrupt(f"an array has elements of type {kind}, which cannot be read")
        numbers: array[int] | array[float] = array(_SCALARS[kind])
        self._check_count("elements of an array", length, numbers.itemsize)
        numbers.frombytes(self._bytes(length * numbers.itemsize))
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers

    def _name(self) -> str:
        return self._string(_MAX_NAME_BYTES)

    def _string(self, max_bytes: int) -> str:
        length = self._unsigned(8)
        if length > max_bytes:
            raise self._corrupt(f"a string claims {length} bytes")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError as error:
            raise self._corrupt("a string is not UTF-8") from error

    def _unsigned(self, width: int) -> int:
        return int.from_bytes(self._bytes(width), "little")

    def _bytes(self, length: int) -> bytes:
        end = self._at + length
        if end > self._size:
            raise self._corrupt("it ends within its head; download it again")
        data = self._data[self._at : end]
        self._at = end
        return data

    def _check_count(self, what: str, count: int, min_bytes: int) -> None:
        if count * min_bytes > self._size - self._at:
            raise self._corrupt(f"it claims {count} {what}, more than fit into it")

    def _corrupt(self, reason: str) -> ModelFormatError:
        return ModelFormatError(f"{self._path} is corrupt near byte {self._at}: {reason}.")
