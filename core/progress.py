"""How a start goes, told to another process."""

from __future__ import annotations

import time
from collections.abc import Callable

from .messages import Progress

INTERVAL_S = 0.1


class ProgressReport:
    """Forwards progress, at most ten times a second and at each end."""

    def __init__(self, send: Callable[[Progress], None]) -> None:
        self._send = send
        self._due = 0.0

    def __call__(self, phase: str, done: int, total: int, unit: str) -> None:
        """A start-up phase has come so far."""
        now = time.monotonic()
        if done == total or now >= self._due:
            self._send(Progress(phase, done, total, unit))
            self._due = now + INTERVAL_S
