"""The JSON files of a .gguf, made once: what Transformers would have kept beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from ..errors import ModelFormatError
from .gguf_config import generation_config, model_config
from .gguf_file import read_gguf
from .gguf_names import weight_parts
from .gguf_tokenizer import tokenizer_files


def convert_gguf(path: Path) -> Mapping[str, str]:
    """File name -> text: config, generation_config, tokenizer and tokenizer_config.

    Raises ModelFormatError or UnsupportedArchitecture; what it returns can be loaded.
    """
    file = read_gguf(path)
    for _ in weight_parts(file):
        pass  # a tensor that belongs nowhere is an error now rather than at load
    tokenizer, tokenizer_config = tokenizer_files(file)
    text = json.dumps(tokenizer, ensure_ascii=False)
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing more special
        raise ModelFormatError(f"{path}: the vocabulary is inconsistent ({error}).") from error
    return {
        "config.json": json.dumps(model_config(file), indent=2),
        "generation_config.json": json.dumps(generation_config(file), indent=2),
        "tokenizer.json": text,
        "tokenizer_config.json": json.dumps(tokenizer_config, ensure_ascii=False, indent=2),
    }
