"""The engine process: `python -m chipset.core.process`, started by the API process and never by hand.

Its standard input brings one line, the EngineLaunch, and then stays open: when it closes, the API process is gone, and
this one ends itself. Commands and events go over ipc:// sockets as msgpack.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq

from .engine import Engine
from .errors import InvalidRequest
from .failures import told
from .heartbeat import Heartbeat
from .messages import (
    Alive,
    Cancel,
    EngineLaunch,
    Event,
    Fatal,
    Rejected,
    StepDone,
    Stop,
    Submit,
    decode_command,
    decode_launch,
    encode,
)
from .progress import ProgressReport

STATS_INTERVAL_S = 0.5
CHECK_INTERVAL_S = 0.5
"""Between two looks at the workers of an engine that has nothing to do."""


class Channel:
    """The sockets of the engine process: commands, events, and one for the thread that says that it lives."""

    def __init__(self, launch: EngineLaunch) -> None:
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PULL)
        self._events = self._context.socket(zmq.PUSH)
        self._beats = self._context.socket(zmq.PUSH)
        for socket in (self._commands, self._events, self._beats):
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.LINGER, 0 if socket is self._beats else 1000)
        self._commands.connect(launch.commands)
        for socket in (self._events, self._beats):
            socket.connect(launch.events)
        self._heartbeat = Heartbeat(lambda: self._beats.send(encode(Alive())))

    def send(self, event: Event) -> None:
        """Never blocks: the API process bounds what it keeps for slow readers."""
        self._events.send(encode(event))

    def receive(self, wait_s: float = 0.0) -> bytes | None:
        """The next command, or None when none comes within `wait_s`."""
        if wait_s and not self._commands.poll(int(1000 * wait_s)):
            return None
        try:
            return self._commands.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def close(self) -> None:
        """Send what is left, for a second at most."""
        self._heartbeat.close()
        for socket in (self._commands, self._events, self._beats):
            socket.close()
        self._context.term()


class EngineLoop:
    """Commands in, steps, events out, until Stop."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self.engine = engine
        self.channel = channel
        self._stopped = False
        self._stats_due = 0.0
        self._was_busy = False

    def run(self) -> None:
        """Returns after Stop; raises what a step raises."""
        while not self._stopped:
            self._receive()
            if self._stopped:
                return
            outputs = self.engine.step()
            if outputs:
                self.channel.send(StepDone(outputs))
            self._send_stats()

    def _receive(self) -> None:
        """All commands that are there; waits for one when there is nothing to run."""
        while not self._stopped:
            is_idle = self.engine.is_idle
            frame = self.channel.receive(CHECK_INTERVAL_S if is_idle else 0.0)
            if frame is not None:
                self._obey(frame)
            elif is_idle:
                self.engine.runner.check()
            else:
                return
            if self.engine.is_idle:
                self._send_stats()

    def _obey(self, frame: bytes) -> None:
        try:
            command = decode_command(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            # a frame that is no command cannot be answered: it names no request
            sys.stderr.write(f"engine: dropped a malformed command: {error}\n")
            return
        match command:
            case Submit():
                try:
                    self.engine.submit(command)
                except InvalidRequest as error:
                    rejected = Rejected(request_id=command.request_id, message=str(error))
                    self.channel.send(rejected)
            case Cancel():
                self.engine.cancel(command.request_ids)
            case Stop():
                self._stopped = True

    def _send_stats(self) -> None:
        now, idle = time.monotonic(), self.engine.is_idle
        if now >= self._stats_due or (idle and self._was_busy):
            if idle:
                self.engine.check()
            self.channel.send(self.engine.stats())
            self._stats_due = now + STATS_INTERVAL_S
        self._was_busy = not idle


def main() -> int:
    """Exit code: 0 after Stop, the error's own when the start failed, 1 when a step did."""
    # Ctrl-C reaches the whole process group; the API process decides when this one ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    launch = decode_launch(line)
    channel = Channel(launch)
    sockets = Path(launch.events.removeprefix("ipc://")).parent
    threading.Thread(
        target=_end_with_parent, args=(sys.stdin.fileno(), sockets), daemon=True
    ).start()
    try:
        return _serve(launch, channel)
    finally:
        channel.close()


def _serve(launch: EngineLaunch, channel: Channel) -> int:
    try:
        # imported here, so that the parent's death is noticed while torch loads
        from .startup import start_engine

        engine = start_engine(launch, ProgressReport(channel.send))
    except Exception as error:  # whatever it is, the API process must hear of it
        failed = told(error)
        channel.send(failed)
        return failed.exit_code
    gc.collect()
    gc.freeze()
    # before Ready, so that whoever serves has figures from the first scrape on
    channel.send(engine.stats())
    channel.send(engine.ready)
    try:
        EngineLoop(engine, channel).run()
    except Exception as error:  # a step that cannot be explained ends the engine, and says so
        message = f"{type(error).__name__}: {error}"
        channel.send(Fatal(message=message, traceback=traceback.format_exc()))
        return 1
    finally:
        engine.close()
    return 0


def _end_with_parent(stdin: int, sockets: Path) -> None:
    # not the buffered reader: a thread that holds its lock makes the interpreter abort at its end
    while os.read(stdin, 4096):
        pass
    # a parent that was killed has left its folder behind
    for name in ("commands", "events"):
        (sockets / name).unlink(missing_ok=True)
    with suppress(OSError):
        sockets.rmdir()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
