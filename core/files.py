"""The files of a model on this machine, as loading found or made them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """Local paths only. For a .gguf, config and tokenizer were converted into the cache once."""

    source: str
    """As the user named it."""
    name: str
    """What /v1/models and /info call it."""
    revision: str | None
    """Commit of a hub model."""
    config: Path
    """config.json"""
    tokenizer: Path
    """tokenizer.json"""
    tokenizer_config: Path | None
    """tokenizer_config.json"""
    chat_template: Path | None
    """chat_template.jinja, where the template is a file of its own."""
    generation_config: Path | None
    """generation_config.json"""
    weights: tuple[Path, ...]
    """Safetensors files, or one .gguf."""
