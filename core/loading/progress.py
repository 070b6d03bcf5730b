"""How long work is reported while it goes on."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""progress(phase, done, total, unit); total is 0 where it is not known, unit is "B" for bytes or empty."""


def silent(phase: str, done: int, total: int, unit: str) -> None:
    """Report nothing."""
