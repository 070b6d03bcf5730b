"""Weights of a model as named tensors, one at a time, so that memory holds the file's pages and one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from ..errors import ModelFormatError
from ..files import ModelFiles
from .gguf_file import GgufTensor, read_gguf
from .gguf_names import WeightPart, weight_parts
from .progress import Progress, silent
from .safetensors_table import read_safetensors_table

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def read_weights(files: ModelFiles, *, progress: Progress = silent) -> Iterator[tuple[str, Tensor]]:
    """(name in Transformers' words, tensor on the CPU) of every weight, in the order of the files.

    Safetensors come in their own dtype. GGUF's floats too; its blocks are decoded to float32, where they are exact.
    Raises ModelFormatError.
    """
    first = files.weights[0]
    if first.suffix.lower() == ".gguf":
        yield from _read_gguf(first, progress)
    else:
        yield from _read_safetensors(files.weights, progress)


def weight_bytes(files: ModelFiles) -> Mapping[str, int]:
    """Bytes in the files by weight, in the order of read_weights; reads only the files' heads."""
    first = files.weights[0]
    if first.suffix.lower() == ".gguf":
        return {part.name: part.stored.num_bytes for part in weight_parts(read_gguf(first))}
    return {
        tensor.name: tensor.num_bytes
        for path in files.weights
        for tensor in read_safetensors_table(path)
    }


def _read_safetensors(paths: Sequence[Path], progress: Progress) -> Iterator[tuple[str, Tensor]]:
    tables = {path: read_safetensors_table(path) for path in paths}
    total = sum(tensor.num_bytes for table in tables.values() for tensor in table)
    done = 0
    for path, table in tables.items():
        with safe_open(path, framework="pt") as file:
            for tensor in table:
                yield tensor.name, file.get_tensor(tensor.name)
                done += tensor.num_bytes
                progress("load", done, total, "B")


def _read_gguf(path: Path, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    file = read_gguf(path)
    total = sum(tensor.num_bytes for tensor in file.tensors.values())
    done = 0
    data: NDArray[np.uint8] = np.memmap(path, mode="r").view(np.ndarray)
    for part in weight_parts(file):
        yield part.name, _decode(part, data)
        done += part.stored.num_bytes
        progress("load", done, total, "B")


def _decode(part: WeightPart, data: NDArray[np.uint8]) -> Tensor:
    stored = part.stored
    raw = data[stored.offset : stored.offset + stored.num_bytes]
    dtype = _PLAIN.get(stored.kind)
    if dtype is not None:
        tensor = torch.from_numpy(raw.copy()).view(dtype).view(stored.shape)
    else:
        tensor = torch.from_numpy(_decode_blocks(stored, raw)).view(stored.shape)
    if part.interleaved_heads:
        tensor = _rotary_halves(tensor, part.interleaved_heads)
    return tensor.float() - 1 if part.plus_one else tensor


def _decode_blocks(stored: GgufTensor, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """gguf decodes 16 rows at a time; rows of up to 256 blocks, wherever the tensor's own end, are 3x as fast."""
    _, block_bytes = GGML_QUANT_SIZES[stored.kind]
    blocks_per_row = math.gcd(stored.num_bytes // block_bytes, 256)
    try:
        # A scale of infinity in the file is the file's affair; numpy would warn of it.
        with np.errstate(all="ignore"):
            return gguf.dequantize(raw.reshape(-1, blocks_per_row * block_bytes), stored.kind)
    except NotImplementedError as error:
        raise ModelFormatError(
            f"{stored.name} is stored as {stored.kind.name}, which cannot be decoded."
        ) from error


def _rotary_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of each head: 0, h, 1, h + 1, … -> 0, 1, …, h, h + 1, … where h is half the head."""
    pairs = tensor.view(num_heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
