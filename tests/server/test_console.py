"""Progress and the start-up summary."""

import io

import pytest

from chipset.server.console import Console, human_bytes, weight_rows
from chipset.server.limits import Limits
from chipset.server.settings import ServerSettings

from .fakes import FILES, ready


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_phase_is_told_at_its_start_and_its_end() -> None:
    stream = io.StringIO()
    console = Console(stream)
    for done in range(101):
        console.progress("load", done * 2**20, 100 * 2**20, "B")
    console.progress("load", 100 * 2**20, 100 * 2**20, "B")
    console.progress("warm-up", 1, 1, "")
    assert stream.getvalue().splitlines() == [
        "load: 0 B of 100.0 MiB",
        "load: 100.0 MiB of 100.0 MiB",
        "warm-up: 1 of 1",
    ]


def test_a_terminal_shows_a_bar() -> None:
    stream = Terminal()
    console = Console(stream)
    console.progress("load", 1, 2, "")
    console.progress("load", 2, 2, "")
    console.end_progress()
    assert "load" in stream.getvalue()
    assert "2 of 2" in stream.getvalue()


def test_the_summary_says_what_why_how_much_and_where() -> None:
    stream = io.StringIO()
    limits = Limits.derive(ServerSettings(), ready(), 300)
    one = ready(reasons={"dtype": "no bfloat16 here"})
    Console(stream).summary(ServerSettings(), FILES, one, limits, "http://127.0.0.1:8080")
    text = stream.getvalue()
    for part in (
        "fake/model",
        "FakeForCausalLM",
        "cpu",
        "asked for",
        "float32",
        "no bfloat16 here",
        "1600 tokens",
        "512 tokens a request",
        "128 at once",
        "http://127.0.0.1:8080",
    ):
        assert part in text


def test_the_summary_says_what_the_weights_take_and_which_kernels_read_them() -> None:
    two = ready(
        weight_bytes=3 * 2**20,
        rank_weight_bytes=[3 * 2**20, 3 * 2**20],
        kernels={"int4 by torch": 210, "plain by torch": 1},
    )
    assert weight_rows(two) == [
        (
            "weights",
            "3.0 MiB on each of 2 ranks; int4 by torch: 210 layers; plain by torch: 1 layer",
        )
    ]


def test_the_summary_says_what_was_unpacked_and_what_that_costs() -> None:
    one = ready(dequantised={"no kernel takes groups of 7": 30}, dequantised_bytes=2**20)
    assert weight_rows(one)[1] == (
        "unpacked",
        "30 layers, no kernel takes groups of 7; takes 1.0 MiB more than packed",
    )


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB")]
)
def test_bytes_are_readable(count: int, text: str) -> None:
    assert human_bytes(count) == text
