"""The kit can fail: it catches every broken plugin that is kept for it, and passes whole ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from mutations_page import page_of

from . import outcomes as runner
from .areas import MUTATIONS
from .mutation import Mutation
from .outcomes import Outcomes

PAGE = Path(__file__).parents[3] / "docs" / "conformance.md"


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return runner.run()


def test_a_whole_plugin_passes_every_suite(outcomes: Outcomes) -> None:
    assert not outcomes.failures, "\n\n".join(outcomes.failures)
    assert outcomes.num_passed > 100


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.area}: {m.name}")
def test_a_broken_plugin_fails(outcomes: Outcomes, mutation: Mutation) -> None:
    assert outcomes.caught_by[mutation], f"nothing catches that {mutation.mistake}"


def test_every_area_has_mistakes_enough() -> None:
    count = Counter(mutation.area for mutation in MUTATIONS)
    assert all(number >= 4 for number in count.values()), count
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 24


def test_the_page_says_what_caught_what(outcomes: Outcomes) -> None:
    assert PAGE.read_text() == page_of(outcomes.caught_by), "run scripts/docs"
