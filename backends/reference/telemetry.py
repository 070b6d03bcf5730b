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
