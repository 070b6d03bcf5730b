from __future__ import annotations

from pathlib import Path

from .page import page

ROOT = Path(__file__).parents[3]


def test_the_page_of_models_is_what_the_cases_say() -> None:
    assert (ROOT / "docs" / "models.md").read_text() == page(), "run scripts/docs"
