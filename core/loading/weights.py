"""From the files of a model to a source of its weights."""

from __future__ import annotations

from ..files import ModelFiles
from ..quantization.ggml import BLOCK_BYTES
from .gguf_source import GgufSource
from .safetensors_source import SafetensorsSource
from .weight_source import WeightSource


def open_weights(files: ModelFiles) -> WeightSource:
    """Reads and checks the heads of all files. Raises ModelFormatError and ModelNotFound."""
    first = files.weights[0]
    if first.suffix.lower() == ".gguf":
        return GgufSource(first, packed=BLOCK_BYTES)
    return SafetensorsSource(files.weights)
