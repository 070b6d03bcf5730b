"""Blocking work beside the event loop that never keeps the process alive."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

T = TypeVar("T")

_NAME = "chipset-background"


async def in_background(work: Callable[[], T]) -> T:
    """What `work` returns or raises. Cancelling stops the waiting, not the work: see `leave`."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.cancelled():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value: T | None = None
        error: BaseException | None = None
        try:
            value = work()
        except BaseException as raised:  # handed to whoever waits
            error = raised
        # the loop may be closed by now
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name=_NAME, daemon=True).start()
    return await result


def is_busy() -> bool:
    """Whether work that nobody waits for any more still runs."""
    return any(thread.name == _NAME for thread in threading.enumerate())


def leave(code: int) -> NoReturn:
    """End this process now, and the processes it started, whatever its threads do."""
    for child in _children():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # the engine leads a group of its own, with its workers in it
            if os.getpgid(child) == child:
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _children() -> list[int]:
    found: list[int] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in task.read_text().split()]
    return found
