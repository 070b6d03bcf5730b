"""The suites can be one class: no name of one hides a name of another."""

from __future__ import annotations

from collections import defaultdict

from .areas import SUITES


def test_no_suite_hides_what_another_defines() -> None:
    owners: dict[str, list[str]] = defaultdict(list)
    for suites in SUITES.values():
        for suite in suites:
            for name in vars(suite):
                if not name.startswith("__") and name != "_abc_impl":
                    owners[name].append(suite.__name__)
    assert {name: by for name, by in owners.items() if len(by) > 1} == {}
