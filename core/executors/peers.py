"""Peers: the engine's ends of its workers, and what it hears from all of them at once."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from ..errors import WorkerDied
from ..heartbeat import BEAT_S, HUNG_BEATS, Silence
from .link import Link, LinkBroken
from .wire import Beat, Message, decode_message

HUNG_S = BEAT_S * HUNG_BEATS
END_S = 1.0
"""What a worker gets to close after its last order."""
COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "chipset.core.worker_process")
"""-P: the working directory may hold a checkout, whose folders must not be found as top-level modules."""


class Peer:
    """One worker as the engine sees it. process None: another launcher started it, and its end is that of the link."""

    def __init__(
        self, rank: int, connection: socket.socket, process: subprocess.Popen[bytes] | None
    ) -> None:
        # a worker that is stopped reads nothing: sending to it must not block for ever
        connection.settimeout(HUNG_S)
        self.rank = rank
        self.link = Link(connection)
        self.process = process
        self.silence = Silence()

    @classmethod
    def spawn(
        cls,
        rank: int,
        environment: Mapping[str, str],
        command: Sequence[str] = COMMAND,
    ) -> Peer:
        """A new process with `environment` set before it imports anything, which waits for its launch."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=dict(environment),
            )
        return cls(rank, ours, process)

    def end(self, why: str) -> WorkerDied:
        """The error of its loss: how its process ended, where that is known."""
        how = why
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(END_S)
                how = f"exit code {code}" if code >= 0 else f"killed by {_signal_name(-code)}"
        return WorkerDied(f"worker {self.rank} ended: {how}")

    def wait(self, deadline: float) -> None:
        """Until its process has ended by itself, or `deadline`."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """It is gone on return."""
        self.link.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Peers:
    """All workers, by rank."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        self._peers = peers
        self._selector = selectors.DefaultSelector()
        for peer in peers:
            self._selector.register(peer.link, selectors.EVENT_READ, peer)
        self._tick = time.monotonic() + BEAT_S
        self.is_watching = False
        """Whether silence means death: not while libraries load and graphs compile, which may stop all threads."""

    def __len__(self) -> int:
        return len(self._peers)

    def send(self, rank: int, frame: bytes) -> None:
        """To one of them. Raises WorkerDied."""
        peer = self._peers[rank]
        try:
            peer.link.send(frame)
        except LinkBroken as error:
            raise peer.end(str(error)) from error

    def send_all(self, frame: bytes) -> None:
        """To each of them. Raises WorkerDied."""
        for rank in range(len(self._peers)):
            self.send(rank, frame)

    def hear(self, wait_s: float) -> Iterator[tuple[int, Message]]:
        """(rank, message) of what has come, after at most wait_s; beats are heard and left out.

        To be called every second or so, for it notices who is gone or has stopped. Raises WorkerDied.
        """
        for key, _ in self._selector.select(wait_s):
            peer: Peer = key.data
            try:
                frames = peer.link.pull()
                messages: list[Message] = [decode_message(frame) for frame in frames]
            except LinkBroken as error:
                raise peer.end(str(error)) from error
            except msgspec.MsgspecError as error:
                raise WorkerDied(f"worker {peer.rank} sent what is no message: {error}") from error
            peer.silence.heard()
            yield from ((peer.rank, one) for one in messages if not isinstance(one, Beat))
        self._check_silence()

    def close(self, *, quickly: bool = False) -> None:
        """End them all: those who were told to close get END_S for it, unless `quickly`."""
        deadline = time.monotonic() + (0.0 if quickly else END_S)
        self._selector.close()
        for peer in self._peers:
            peer.wait(deadline)
        for peer in self._peers:
            peer.close()

    def _check_silence(self) -> None:
        now = time.monotonic()
        if now < self._tick:
            return
        self._tick = now + BEAT_S
        for peer in self._peers:
            if peer.silence.is_over_long() and self.is_watching:
                raise WorkerDied(f"worker {peer.rank} gave no sign of life for {HUNG_S:.0f} s")


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
