from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipset.core.errors import InvalidRequest
from chipset.core.text.stop_strings import StopStrings

LETTERS = "ab\n"


def _by_force(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Look at every prefix in turn."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    text=st.text(LETTERS, max_size=40),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
@settings(max_examples=1000, deadline=None)
def test_finds_what_brute_force_finds_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    expected, matched = _by_force(text, stops)
    finder = StopStrings(stops)
    sent, found = "", None
    borders = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    for start, end in itertools.pairwise(borders):
        match = finder.push(text[start:end])
        sent += match.text_before
        found = found or match.matched
        assert expected.startswith(sent)
    assert sent + finder.flush() == expected
    assert found == matched


def test_holds_back_only_what_may_become_a_stop_string() -> None:
    finder = StopStrings(["\nUser:"])
    assert finder.push("Hello\nU").text_before == "Hello"
    assert finder.push("nder").text_before == "\nUnder"
    match = finder.push("stood.\nUser: more")
    assert (match.text_before, match.matched) == ("stood.", "\nUser:")
    assert finder.push("ignored").text_before == ""
    assert finder.flush() == ""


def test_of_stop_strings_that_end_together_the_longest_counts() -> None:
    match = StopStrings(["b", "ab"]).push("xab")
    assert (match.text_before, match.matched) == ("x", "ab")


def test_the_one_that_is_complete_first_counts() -> None:
    match = StopStrings(["abcd", "bc"]).push("abcd")
    assert (match.text_before, match.matched) == ("a", "bc")


def test_without_stop_strings_everything_passes() -> None:
    assert StopStrings([]).push("text").text_before == "text"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        StopStrings([""])


def test_takes_linear_time_on_text_made_to_be_slow() -> None:
    finder = StopStrings(["a" * 1000 + "b", "a" * 999 + "c"])
    before = time.process_time()
    for _ in range(200):
        finder.push("a" * 1000)
    assert time.process_time() - before < 2
