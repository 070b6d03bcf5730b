"""Which layers of a model are quantised."""

from __future__ import annotations

from collections.abc import Sequence

from ..models.families import FAMILIES


def is_listed(module: str, listed: Sequence[str]) -> bool:
    """Whether a list such as modules_to_not_convert names it: all of its name, or some of its dotted parts in a row."""
    return any(f".{name.strip('.')}." in f".{module}." for name in listed)


def plain_everywhere() -> Sequence[str]:
    """What stays plain where we choose: a few numbers that decide much, and tables whose rows are looked up."""
    names = [family.names for family in FAMILIES.values()]
    found = {part for n in names for part in (n.head, n.embedding, n.router) if part}
    return sorted(found)
