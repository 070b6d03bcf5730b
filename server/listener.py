"""The listening socket, opened before a model is loaded, so that a port in use is known at once."""

from __future__ import annotations

import errno
import socket

from .errors import CannotListen

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises CannotListen with the cure."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise CannotListen(
            f"--host {host} is no address of this machine ({error.strerror}); "
            "give 127.0.0.1, or 0.0.0.0 for every network"
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = (
                f"port {port} of {host} is in use; end what listens there, or give another --port"
            )
        else:
            message = f"cannot listen on {host} port {port} ({error.strerror}); give another --port"
        raise CannotListen(message) from error
    return listener


def url(listener: socket.socket, host: str) -> str:
    """Where a client on this machine finds it."""
    port = listener.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)  # noqa: S104
    return f"http://{shown}:{port}"
