"""Weights in safetensors files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ModelFormatError
from .safetensors_table import DTYPES, TableRow, read_safetensors_table
from .weight_source import Part, WeightEntry, WeightSource, decode_plain, map_file, whole_part


class SafetensorsSource(WeightSource):
    """All tensors of some files, each in the dtype that it is stored in."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._rows: dict[str, tuple[Path, TableRow]] = {}
        for path in paths:
            for row in read_safetensors_table(path):
                if row.name in self._rows:
                    raise ModelFormatError(
                        f"the checkpoint holds {row.name} twice, in {self._rows[row.name][0].name} and {path.name}; "
                        "fetch the model anew"
                    )
                self._rows[row.name] = path, row
        self._files = {path: map_file(str(path)) for path in paths}
        self.weights = {
            name: WeightEntry(shape=row.shape, dtype=DTYPES[row.dtype], num_bytes=row.num_bytes)
            for name, (_, row) in self._rows.items()
        }

    def read(self, name: str, part: Part = ()) -> Tensor:
        """See WeightSource.read."""
        path, row = self._rows[name]
        raw = self._files[path][row.offset : row.offset + row.num_bytes]
        dtype: torch.dtype = getattr(torch, DTYPES[row.dtype])
        tensor = decode_plain(raw, row.shape, dtype, whole_part(row.shape, part))
        self.bytes_read += tensor.nbytes
        return tensor
