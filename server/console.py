"""What a person sees: progress while a model starts and what came of it on standard error, answers on output."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

from .. import __version__
from ..core.files import ModelFiles
from ..core.messages import Ready
from .limits import Limits
from .settings import ServerSettings

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_INTERVAL_S = 5.0
"""Between two lines about the same phase where there is no terminal."""


class Console:
    """Bars on a terminal, plain lines elsewhere. `progress` may be called from any thread."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._shown: dict[str, float] = {}

    def note(self, text: str) -> None:
        """One line."""
        with self._lock:
            print(text, file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Part of an answer, on standard output."""
        print(text, end="", flush=True)

    def progress(self, phase: str, done: int, total: int, unit: str) -> None:
        """How far `phase` is; a total of 0 is unknown, the unit "B" is bytes."""
        with self._lock:
            if self._stream.isatty():
                self._draw(phase, done, total, unit)
            else:
                self._tell(phase, done, total, unit)

    def end_progress(self) -> None:
        """Leave what is drawn; the next progress starts anew."""
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
            self._bars = None
            self._tasks.clear()
            self._shown.clear()

    def summary(
        self,
        settings: ServerSettings,
        files: ModelFiles,
        ready: Ready,
        limits: Limits,
        url: str,
    ) -> None:
        """What is served, on what, why, how much fits, and where."""
        rows = [
            ("model", f"{files.name} ({ready.architecture})"),
            *weight_rows(ready),
            ("backend", f"{ready.backend} on {ready.device} ({ready.reason})"),
            ("dtype", f"{ready.dtype}, KV cache {ready.kv_dtype}{_why(ready, 'dtype')}"),
            (
                "KV cache",
                f"{ready.kv_tokens} tokens in {ready.num_blocks} blocks of {ready.block_size}",
            ),
            (
                "limits",
                f"{limits.max_total_tokens} tokens a request, {settings.max_concurrent_requests} at once",
            ),
            (
                "steps",
                f"up to {ready.max_batch_tokens} tokens of {ready.max_batch_rows} requests",
            ),
            ("serving", url),
        ]
        self.end_progress()
        self.note(f"chipset {__version__}")
        for name, text in rows:
            self.note(f"  {name:9} {text}")

    def _draw(self, phase: str, done: int, total: int, unit: str) -> None:
        if self._bars is None:
            # rich takes 0.1 s to import, and only a terminal needs it
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bars = Progress(
                TextColumn("{task.description:12}"),
                BarColumn(),
                TextColumn("{task.fields[amount]}"),
                TimeElapsedColumn(),
                console=Terminal(file=self._stream),
            )
            self._bars.start()
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total or None, amount="")
        self._bars.update(
            self._tasks[phase],
            completed=done,
            total=total or None,
            amount=_amount(done, total, unit),
        )

    def _tell(self, phase: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        is_new = phase not in self._shown
        is_done = bool(total) and done >= total
        if is_new or is_done or now - self._shown[phase] >= PLAIN_INTERVAL_S:
            if self._shown.get(phase) == float("inf"):
                return
            self._shown[phase] = float("inf") if is_done else now
            print(f"{phase}: {_amount(done, total, unit)}", file=self._stream, flush=True)


def weight_rows(ready: Ready) -> list[tuple[str, str]]:
    """What the weights take, and which kernels multiply by them; what had to be unpacked for lack of one."""
    held = human_bytes(ready.weight_bytes)
    count = len(ready.rank_weight_bytes)
    if count > 1:
        held = f"{held} on each of {count} ranks"
    kernels = [f"{name}: {_layers(number)}" for name, number in ready.kernels.items()]
    rows = [("weights", "; ".join([held, *kernels]))]
    if ready.dequantised:
        reasons = [f"{_layers(number)}, {why}" for why, number in ready.dequantised.items()]
        more = f"takes {human_bytes(ready.dequantised_bytes)} more than packed"
        rows.append(("unpacked", "; ".join([*reasons, more])))
    return rows


def _layers(number: int) -> str:
    return f"{number} layer" if number == 1 else f"{number} layers"


def _why(ready: Ready, option: str) -> str:
    reason = ready.reasons.get(option)
    return f" ({reason})" if reason else ""


def _amount(done: int, total: int, unit: str) -> str:
    if unit == "B":
        return f"{human_bytes(done)} of {human_bytes(total)}" if total else human_bytes(done)
    tail = f" {unit}" if unit else ""
    return f"{done} of {total}{tail}" if total else f"{done}{tail}"


def human_bytes(count: int) -> str:
    """Such as 92.1 MiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
