"""A SentencePiece-like tokenizer with byte tokens, small enough to read."""

from __future__ import annotations

import json
from pathlib import Path

from chipset.core.files import ModelFiles

WORDS = ["▁", "a", "b", "▁a", "ab", "▁ab", "é", "\ufffd"]
SPECIAL = ["<s>", "</s>"]


def byte_token(byte: int) -> int:
    """Id of a byte's token."""
    return len(SPECIAL) + byte


def sentencepiece_json() -> dict[str, object]:
    """tokenizer.json with a prefix space, byte fallback and a bos token."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    merges = [["▁", "a"], ["a", "b"], ["▁", "ab"], ["▁a", "b"]]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": {
            "max_length": 3,
            "stride": 0,
            "strategy": "LongestFirst",
            "direction": "Right",
        },
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, token in enumerate(SPECIAL)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def write_files(
    folder: Path,
    *,
    config: object = None,
    generation_config: object = None,
    tokenizer_config: object = None,
    chat_template: str | None = None,
    tokenizer: str | None = None,
) -> ModelFiles:
    """The files that a tokenizer reads; None leaves one out."""

    def put(name: str, text: str | None) -> Path | None:
        if text is None:
            return None
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    def as_json(value: object) -> str | None:
        return None if value is None else json.dumps(value)

    put("config.json", as_json(config or {}))
    put("tokenizer.json", tokenizer or json.dumps(sentencepiece_json()))
    return ModelFiles(
        source="test",
        name="test",
        revision=None,
        config=folder / "config.json",
        tokenizer=folder / "tokenizer.json",
        tokenizer_config=put("tokenizer_config.json", as_json(tokenizer_config)),
        chat_template=put("chat_template.jinja", chat_template),
        generation_config=put("generation_config.json", as_json(generation_config)),
        weights=(),
    )
