from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chipset.core.text.tokenizer import Tokenizer

from .small_tokenizer import SPECIAL, WORDS, byte_token, write_files


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], *, skip: bool = True) -> list[str]:
    stream = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.load(write_files(folder))


@pytest.fixture(scope="module")
def broken_ids(default_tokenizer: Tokenizer) -> list[int]:
    """Ids that are no whole characters by themselves."""
    ids = range(default_tokenizer.vocab_size)
    return [token for token in ids if "\ufffd" in default_tokenizer.decode([token])]


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_pieces_of_byte_level_ids_are_the_whole(
    default_tokenizer: Tokenizer, broken_ids: list[int], data: st.DataObject, skip: bool
) -> None:
    token = st.one_of(
        st.integers(0, default_tokenizer.vocab_size - 1),
        st.sampled_from(broken_ids),
        st.integers(0, 16),
    )
    ids = data.draw(st.lists(token, max_size=40))
    whole = default_tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(_pieces(default_tokenizer, ids, skip=skip)) == whole


@given(
    ids=st.lists(st.integers(0, len(SPECIAL) + 256 + len(WORDS) - 1), max_size=12),
    skip=st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_pieces_of_byte_fallback_ids_are_the_whole(
    small: Tokenizer, ids: list[int], skip: bool
) -> None:
    whole = small.decode(ids, skip_special_tokens=skip)
    assert "".join(_pieces(small, ids, skip=skip)) == whole


@given(text=st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_no_piece_of_a_text_cuts_a_character(default_tokenizer: Tokenizer, text: str) -> None:
    ids = default_tokenizer.encode(text)
    # The vocabulary lacks a few of the 256 bytes, so that some rare characters are lost in it.
    assume(default_tokenizer.decode(ids, skip_special_tokens=False) == text)
    pieces = _pieces(default_tokenizer, ids, skip=False)
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_a_long_run_of_broken_bytes_comes_out_whole(
    default_tokenizer: Tokenizer, broken_ids: list[int]
) -> None:
    ids = (broken_ids * 3)[:500] + default_tokenizer.encode("é ok")
    pieces = _pieces(default_tokenizer, ids)
    assert "".join(pieces) == default_tokenizer.decode(ids)
    assert sum(map(len, pieces[:400])) > 100


def test_an_emoji_waits_for_its_last_byte(small: Tokenizer) -> None:
    emoji = [byte_token(byte) for byte in "🎉".encode()]
    (word,) = small.encode("ab", add_special_tokens=False)
    assert _pieces(small, [word, *emoji, word]) == ["ab", "", "", "", "", "🎉 ab", ""]
    assert _pieces(small, emoji)[-1] == "🎉"


def test_an_answer_goes_on_from_its_prompt(small: Tokenizer) -> None:
    (word,) = small.encode("ab", add_special_tokens=False)
    assert small.detokenizer().push(word) == "ab"
    assert small.detokenizer(prompt=small.encode("a")).push(word) == " ab"
    assert small.detokenizer(prompt=[0]).push(word) == "ab"


def test_flushing_twice_gives_nothing_more(small: Tokenizer) -> None:
    stream = small.detokenizer()
    stream.push(byte_token(0xC3))
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
