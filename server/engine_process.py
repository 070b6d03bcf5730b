"""The engine subprocess: started, watched, and always ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from ..core.messages import EngineLaunch, encode_launch

COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "chipset.core.process")
"""-P: the working directory may hold a checkout, whose folders must not be found as top-level modules."""
STOP_S = 1.5
"""What a stopped engine gets before it is killed."""


class EngineProcess:
    """One engine process, in a session of its own so that a terminal's Ctrl-C reaches only us.

    It ends itself when its standard input closes, so it never outlives this process, not even a killed one.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, launch: EngineLaunch, command: Sequence[str] = COMMAND) -> EngineProcess:
        """Start it and hand it `launch`; what it says comes over the sockets named there."""
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert process.stdin is not None
        engine = cls(process)
        try:
            # an engine that died this early is reported by wait()
            with contextlib.suppress(ConnectionError):
                process.stdin.write(encode_launch(launch) + b"\n")
                await process.stdin.drain()
        except BaseException:
            engine.kill()
            raise
        return engine

    @property
    def pid(self) -> int:
        """Also the id of its process group."""
        return self._process.pid

    async def wait(self) -> str:
        """Until it ends; how it ended, in words."""
        code = await self._process.wait()
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"

    async def stop(self, grace_s: float = STOP_S, *, was_told: bool = False) -> None:
        """Close its input, wait `grace_s`, then kill it and all it started. Safe to call twice.

        was_told: it has its Stop, and gets the time to end its workers in order; its input closes after that.
        """
        try:
            async with asyncio.timeout(grace_s):
                if not was_told:
                    self._close_input()
                await self._process.wait()
        except TimeoutError:
            pass
        finally:
            self._close_input()
            self.kill()
        await self._process.wait()

    def _close_input(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self) -> None:
        """At once, its workers too."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
