"""The kit's texts of many ranks: right on the CPU, and seen where one token is not."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from _pytest.outcomes import Skipped
from fakes import NullPlugin

from chipset.backends.plugin import Plugin
from chipset.backends.registry import Registry
from chipset.core.conformance.ranks import RankConformance
from chipset.core.conformance.traffic import Answer, Arrival
from chipset.core.files import ModelFiles


class Quick(RankConformance):
    is_quick = True
    served: list[int]

    def __init__(self, shift: int = 0) -> None:
        self.served = []
        self.shift = shift

    def _serve_by(
        self, count: int, plugin: Plugin, files: ModelFiles, arrivals: Sequence[Arrival]
    ) -> Mapping[int, Answer]:
        """By one rank each time, and a token of what many would draw is another one."""
        self.served.append(count)
        answers = super()._serve_by(1, plugin, files, arrivals)
        if count > 1:
            tokens = next(a for a in answers.values() if len(a.tokens) > 2).tokens
            tokens[1] = type(tokens[1])(id=tokens[1].id + self.shift)
        return answers


def call(suite: RankConformance, plugin: Plugin, folder: Path, **changes: object) -> str:
    recorded: dict[str, object] = {}
    capabilities = replace(plugin.capabilities(plugin.probe()), **changes)
    suite.test_ranks_together_give_the_text_of_one(
        "moe", 2, plugin, capabilities, folder, recorded.__setitem__
    )
    return str(recorded["figures"])


@pytest.fixture
def cpu() -> Plugin:
    return Registry.discover().load("cpu")


def test_the_same_text_passes_and_is_told(cpu: Plugin, tmp_path: Path) -> None:
    suite = Quick()
    assert "10 of 10 texts equal" in call(suite, cpu, tmp_path)
    assert suite.served == [1, 2]


def test_one_other_token_does_not_pass(cpu: Plugin, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="differs at token 1"):
        call(Quick(shift=1), cpu, tmp_path)


def test_what_is_not_claimed_is_skipped_with_its_reason(cpu: Plugin, tmp_path: Path) -> None:
    with pytest.raises(Skipped, match="all_gather: not claimed"):
        call(Quick(), cpu, tmp_path, collectives=frozenset({"all_reduce"}))
    with pytest.raises(Skipped, match="this one has none"):
        call(Quick(), NullPlugin(), tmp_path, collectives=frozenset({"all_reduce", "all_gather"}))
