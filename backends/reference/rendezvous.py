"""Where ranks first meet: a TCPStore that one process keeps open on the loopback device, and the others' way to it."""

from __future__ import annotations

import socket
from datetime import timedelta
from urllib.parse import urlsplit

from torch._C._distributed_c10d import TCPStore

LOOPBACK = "127.0.0.1"


def serve(meet_s: float, host: str = LOOPBACK) -> tuple[TCPStore, str]:
    """A store that is reached at `host` alone, and its address for Launch.rendezvous. It lives as long as it does."""
    listening = socket.socket()
    listening.bind((host, 0))  # torch itself would listen on every device
    listening.listen()
    port: int = listening.getsockname()[1]
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=meet_s),
        master_listen_fd=listening.detach(),
    )
    return store, f"tcp://{host}:{port}"


def connect(address: str, meet_s: float) -> TCPStore:
    """To the store at tcp://host:port, whose answers may take meet_s. Raises torch's DistError where nobody answers."""
    place = urlsplit(address)
    if place.scheme != "tcp" or place.hostname is None or place.port is None:
        raise ValueError(f"rendezvous {address!r}: expected tcp://host:port")
    return TCPStore(place.hostname, place.port, is_master=False, timeout=timedelta(seconds=meet_s))


def is_loopback(address: str) -> bool:
    """Whether all that meet there are on one host."""
    return urlsplit(address).hostname in (LOOPBACK, "::1", "localhost")
