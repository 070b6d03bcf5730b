"""Link: frames over a stream socket, each with its length before it."""

from __future__ import annotations

import socket
import struct
import threading

_HEAD = struct.Struct("<Q")
MAX_FRAME_BYTES = 2**30
_PART_BYTES = 2**18


class LinkBroken(Exception):
    """The other side is gone, or sends what is no frame."""


class Link:
    """Belongs to one thread, but for `send`, which any may call. Closes its socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        self._pending = bytearray()

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def send(self, frame: bytes) -> None:
        """Blocks while the other side's buffer is full, as long as the socket's timeout lets it. Raises LinkBroken."""
        try:
            with self._sending:
                self._socket.sendall(_HEAD.pack(len(frame)) + frame)
        except OSError as error:
            raise LinkBroken(f"nothing can be sent: {error}") from error

    def receive(self) -> bytes:
        """Wait for the next frame. Raises LinkBroken."""
        while True:
            frames = self._take(most=1)
            if frames:
                return frames[0]
            self._fill()

    def pull(self) -> list[bytes]:
        """All frames that are complete after one read, for a socket that select calls readable. Raises LinkBroken."""
        self._fill()
        return self._take()

    def close(self) -> None:
        """The other side sees the end."""
        self._socket.close()

    def _fill(self) -> None:
        try:
            part = self._socket.recv(_PART_BYTES)
        except OSError as error:
            raise LinkBroken(f"nothing can be read: {error}") from error
        if not part:
            raise LinkBroken("the other side hung up")
        self._pending += part

    def _take(self, most: int | None = None) -> list[bytes]:
        frames: list[bytes] = []
        while len(self._pending) >= _HEAD.size and len(frames) != most:
            (length,) = _HEAD.unpack_from(self._pending)
            if length > MAX_FRAME_BYTES:
                raise LinkBroken(f"a frame of {length} bytes")
            end = _HEAD.size + length
            if len(self._pending) < end:
                break
            frames.append(bytes(memoryview(self._pending)[_HEAD.size : end]))
            del self._pending[:end]
        return frames
