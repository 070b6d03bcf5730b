"""docs/conformance.md: its tables, made of the kit's tolerances and of what caught which broken plugin."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chipset.backends.conformance.tolerance import TOLERANCES
from chipset.server.tables import markdown

if TYPE_CHECKING:
    from tests.backends.conformance.mutation import Mutation

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "conformance.md"


def page() -> str:
    """The whole file. Runs the kit against every broken plugin, which takes about a minute."""
    sys.path.insert(0, str(ROOT))  # for tests/, which is not installed
    from tests.backends.conformance import outcomes

    return page_of(outcomes.run().caught_by)


def page_of(caught_by: Mapping[Mutation, str | None]) -> str:
    """The whole file, once it is known what caught which."""
    tolerances = [
        (name, f"{t.absolute:g} + {t.relative:g} × value", t.reason)
        for name, t in TOLERANCES.items()
    ]
    mutations = [
        (mutation.area, mutation.name, mutation.mistake, _sentence(test))
        for mutation, test in caught_by.items()
    ]
    text = _replaced(
        PAGE.read_text(), "tolerances", ("dtype", "error allowed", "reason"), tolerances
    )
    columns = ("area", "mutation", "what it does wrong", "caught by")
    return _replaced(text, "mutations", columns, mutations)


def _replaced(text: str, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`text` with that table between the markers of `name`."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{markdown(columns, rows)}\n\n{end}{after}"


def _sentence(test: str | None) -> str:
    """A test's name as it reads."""
    if test is None:
        return "nothing"
    name, bracket, case = test.partition("[")
    return name.removeprefix("test_").replace("_", " ") + (f" ({case[:-1]})" if bracket else "")
