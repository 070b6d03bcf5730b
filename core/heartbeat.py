"""Heartbeats: a process that lives says so every second, in a thread of its own, so that a long step is no silence."""

from __future__ import annotations

import threading
from collections.abc import Callable

BEAT_S = 1.0
HUNG_BEATS = 6
"""Beats that fail to come before a process is taken for stopped."""


class Heartbeat:
    """Calls `beat` every BEAT_S, in a thread that no one waits for, until closed."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chipset-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """`beat` is not called any more."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(BEAT_S):
            self._beat()


class Silence:
    """How many beats in a row a process has missed.

    Counted in beats that somebody was there to hear, not by the clock: a machine that slept, or a listener that was
    stopped itself, has missed none.
    """

    def __init__(self) -> None:
        self._missed = 0
        self._heard = True

    def heard(self) -> None:
        """Something came from it."""
        self._heard = True

    def is_over_long(self) -> bool:
        """To be asked every BEAT_S: whether it has said nothing for HUNG_BEATS of them."""
        self._missed = 0 if self._heard else self._missed + 1
        self._heard = False
        return self._missed >= HUNG_BEATS
