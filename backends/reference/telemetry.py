"""Counters that a plugin's parts add to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..telemetry import Telemetry


class Counters(Counter[str], Telemetry):
    """How often each thing happened: counters["sums"] += 1."""

    def counters(self) -> Mapping[str, float]:
        """See Telemetry.counters."""
        return self

    def give(self, *parts: object) -> None:
        """To those of the parts that count."""
        for part in parts:
            if isinstance(part, Counting):
                part.counters = self


class Counting:
    """A part of a backend that counts what it does."""

    counters: Counters
    """Its backend's."""
