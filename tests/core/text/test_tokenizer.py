from __future__ import annotations

from pathlib import Path

import pytest

from chipset.core.errors import InvalidRequest, ModelFormatError
from chipset.core.files import ModelFiles
from chipset.core.text.tokenizer import Tokenizer

from .small_tokenizer import byte_token, write_files

CORPUS = [
    "Hello world", "  two  spaces\n\n\ttab", "1234567890 3.14 12,345", "日本語 한국어 العربية हिन्दी",
    "🎉🏳️‍🌈 👩‍👩‍👧", "def f(x):\n    return x ** 2  # comment\n", "don't I'LL we've",
    "<|im_start|>user\nhi<|im_end|>", "\u0000\u200b\ufeff", "a" * 300, " ", "", "\n", "e\u0301 é",
    "<table><tr>", "▁x ▁▁", "ﷺ 𝕳𝖊𝖑𝖑𝖔", "\r\n x\r\n\r\n", "https://a.b/c?d=e&f=1",
]  # fmt: skip


@pytest.mark.e2e
@pytest.mark.filterwarnings("default")
def test_default_tokenizer_is_the_one_that_transformers_makes(
    default_files: ModelFiles, default_tokenizer: Tokenizer
) -> None:
    from transformers import AutoTokenizer

    path = default_files.weights[0]
    kwargs = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    oracle = AutoTokenizer.from_pretrained(path.parent, **kwargs)
    assert default_tokenizer.vocab_size == len(oracle)
    for text in CORPUS:
        ids = default_tokenizer.encode(text)
        assert ids == oracle.encode(text)
        assert default_tokenizer.decode(ids) == oracle.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_default_tokenizer_gives_texts_back(default_tokenizer: Tokenizer) -> None:
    for text in CORPUS:
        ids = default_tokenizer.encode(text)
        assert default_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_default_tokenizer_cuts_digits_apart(default_tokenizer: Tokenizer) -> None:
    assert len(default_tokenizer.encode("2024")) == 4


def test_special_tokens_in_a_text_become_their_ids(default_tokenizer: Tokenizer) -> None:
    (token,) = default_tokenizer.encode("<|im_end|>")
    assert default_tokenizer.eos_ids == (token,)
    assert default_tokenizer.eos_token == "<|im_end|>"
    assert default_tokenizer.is_special(token)
    assert default_tokenizer.decode([token]) == ""
    assert default_tokenizer.token_text(token) == "<|im_end|>"


def test_adds_special_tokens_only_where_asked(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_files(tmp_path))
    with_bos = tokenizer.encode("ab")
    assert with_bos[0] == 0
    assert tokenizer.encode("ab", add_special_tokens=False) == with_bos[1:]


def test_a_tokenizer_that_cuts_texts_off_does_not_here(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_files(tmp_path))
    assert len(tokenizer.encode("b" * 50)) > 50


def test_a_token_keeps_its_leading_space(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_files(tmp_path))
    (token,) = tokenizer.encode("ab", add_special_tokens=False)
    assert tokenizer.decode([token]) == "ab"
    assert tokenizer.token_text(token) == " ab"
    assert tokenizer.token_text(byte_token(0xC3)) == "\ufffd"
    assert tokenizer.token_text(1) == "</s>"


def test_every_file_may_name_an_end(tmp_path: Path) -> None:
    files = write_files(
        tmp_path,
        config={"eos_token_id": 7},
        generation_config={"eos_token_id": [9, 8]},
        tokenizer_config={"eos_token": {"content": "</s>"}, "bos_token": "<s>"},
    )
    tokenizer = Tokenizer.load(files)
    assert tokenizer.eos_ids == (1, 7, 8, 9)
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.bos_token == "<s>"


def test_no_file_need_name_an_end(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_files(tmp_path, config={"eos_token_id": None}))
    assert tokenizer.eos_ids == ()
    assert tokenizer.eos_token is None
    assert tokenizer.chat_template is None


def test_a_template_file_goes_before_the_config(tmp_path: Path) -> None:
    config = {"chat_template": "from the config", "eos_token": "</s>"}
    tokenizer = Tokenizer.load(write_files(tmp_path, tokenizer_config=config))
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.source == "from the config"
    files = write_files(tmp_path, tokenizer_config=config, chat_template="file {{ eos_token }}")
    template = Tokenizer.load(files).chat_template
    assert template is not None
    assert template.render([]) == "file </s>"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tokenizer = Tokenizer.load(write_files(tmp_path, tokenizer_config={"chat_template": named}))
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.source == "plain"


def test_texts_that_are_too_long_fail_before_they_are_encoded(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_files(tmp_path))
    with pytest.raises(InvalidRequest, match="5 characters, at most 4"):
        tokenizer.encode("aaaaa", max_chars=4)


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_files(tmp_path))
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', "[" * 100_000])
def test_a_broken_tokenizer_is_a_format_error(tmp_path: Path, text: str) -> None:
    files = write_files(tmp_path)
    files.tokenizer.write_text(text)
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        Tokenizer.load(files)


def test_a_broken_config_is_a_format_error(tmp_path: Path) -> None:
    files = write_files(tmp_path, tokenizer_config={})
    assert files.tokenizer_config is not None
    files.tokenizer_config.write_text("[]")
    with pytest.raises(ModelFormatError, match=r"tokenizer_config\.json"):
        Tokenizer.load(files)
