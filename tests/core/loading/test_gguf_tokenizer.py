from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from chipset.core.errors import ModelFormatError, UnsupportedArchitecture
from chipset.core.loading.gguf_file import read_gguf
from chipset.core.loading.gguf_tokenizer import tokenizer_files

from .ggufs import MERGES, TOKENS, tiny_llama

SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
SPM_PIECES = ["▁", "a", "b", "c", "▁a", "ab", "bc", "▁ab", "<turn>"]
SPM_SCORES = [0.0, 0.0, 0.0, 0.0, -3.0, -2.0, -1.0, -4.0, 0.0]


def _byte_level(path: Path, **changed: object) -> tuple[tokenizers.Tokenizer, dict[str, object]]:
    changed = {f"tokenizer__ggml__{name}": value for name, value in changed.items()}
    tokenizer, config = tokenizer_files(read_gguf(tiny_llama(path / "model.gguf", **changed)))
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer)), config


def _sentencepiece(path: Path, **changed: object) -> tokenizers.Tokenizer:
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(SPM_PIECES) - 1) + [4]
    keys: dict[str, object] = {
        "model": "llama",
        "tokens": SPM_TOKENS + SPM_PIECES,
        "scores": [0.0] * len(SPM_TOKENS) + SPM_SCORES,
        "token_type": kinds,
        "merges": None,
        "pre": "default",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return _byte_level(path, **(keys | changed))[0]


def _tokens(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    return list(tokenizer.encode(text).tokens)


def test_merges_what_the_file_lists(tmp_path: Path) -> None:
    tokenizer, _ = _byte_level(tmp_path)
    assert _tokens(tokenizer, "ab ab") == ["ab", "Ġa", "b"]
    assert tokenizer.decode(tokenizer.encode("ab ab").ids) == "ab ab"


def test_a_piece_that_is_a_token_may_go_before_merges(tmp_path: Path) -> None:
    """Llama 3's rule; its merges lead elsewhere."""
    tokenizer, _ = _byte_level(tmp_path, pre="llama-bpe", add_bos_token=False)
    assert _tokens(tokenizer, "ab ab") == ["ab", "Ġab"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["12345"]),
        ("llama-bpe", ["123", "45"]),
        ("qwen2", ["1", "2", "3", "4", "5"]),
        ("smollm", ["1", "2", "3", "4", "5"]),
    ],
)
def test_digits_are_cut_as_the_model_learned_them(
    tmp_path: Path, pre: str, pieces: list[str]
) -> None:
    tokenizer, _ = _byte_level(tmp_path, pre=pre)
    assert tokenizer.pre_tokenizer is not None
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("12345")] == pieces


def test_llama_3_begins_with_bos_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    assert _tokens(_byte_level(tmp_path, pre="llama-bpe")[0], "a") == ["<|turn|>", "a"]
    assert _tokens(_byte_level(tmp_path, pre="gpt-2")[0], "a") == ["a"]
    assert _tokens(_byte_level(tmp_path, add_bos_token=True)[0], "a") == ["<|turn|>", "a"]
    both, _ = _byte_level(tmp_path, add_bos_token=True, add_eos_token=True)
    assert _tokens(both, "a") == ["<|turn|>", "a", "<|end|>"]


def test_control_tokens_are_special(tmp_path: Path) -> None:
    tokenizer, config = _byte_level(tmp_path)
    assert _tokens(tokenizer, "a<|turn|>b") == ["a", "<|turn|>", "b"]
    assert tokenizer.decode(tokenizer.encode("a<|turn|>b").ids) == "ab"
    assert config["eos_token"] == "<|end|>"


def test_scores_rank_the_merges_of_sentencepiece(tmp_path: Path) -> None:
    tokenizer = _sentencepiece(tmp_path, add_bos_token=False)
    assert _tokens(tokenizer, "abc") == ["▁a", "bc"]
    assert _tokens(tokenizer, "ab") == ["▁ab"]
    assert _tokens(_sentencepiece(tmp_path), "ab")[0] == "<s>"


def test_sentencepiece_falls_back_to_bytes(tmp_path: Path) -> None:
    tokenizer = _sentencepiece(tmp_path, add_space_prefix=False, add_bos_token=False)
    assert _tokens(tokenizer, "é") == ["<0xC3>", "<0xA9>"]
    ids = tokenizer.encode("é <turn>a").ids
    assert tokenizer.decode(ids) == "é <turn>a"
    assert "<turn>" in tokenizer.encode("é <turn>a").tokens


@pytest.mark.parametrize(
    ("changed", "kind", "reason"),
    [
        ({"model": "unigram"}, UnsupportedArchitecture, "'unigram'; gpt2 and llama"),
        ({"pre": "mystery"}, UnsupportedArchitecture, "'mystery'"),
        ({"merges": [*MERGES, "abc"]}, ModelFormatError, "no pair"),
        ({"merges": None}, ModelFormatError, "merges is absent"),
        ({"tokens": [*TOKENS[:-1], TOKENS[0]]}, ModelFormatError, "a token twice"),
        ({"token_type": [1, 3]}, ModelFormatError, "do not belong together"),
        ({"bos_token_id": 9999}, ModelFormatError, "beyond the vocabulary"),
    ],
)
def test_a_vocabulary_that_cannot_be_read_says_why(
    tmp_path: Path, changed: dict[str, object], kind: type[Exception], reason: str
) -> None:
    with pytest.raises(kind, match=reason):
        _byte_level(tmp_path, **changed)
