"""A worker process: `python -m chipset.core.worker_process FD`, started by the engine process and never by hand.

FD is its end of a socket pair: a WorkerLaunch comes first, then orders. When the other end closes, the engine is gone,
and this process ends itself, whatever it does.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading


def main() -> int:
    """Exit code 0 after Close, 1 where the start failed."""
    # a terminal's Ctrl-C reaches the whole process group; the API process decides when this one ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return work(socket.socket(fileno=int(sys.argv[1])))


def work(connection: socket.socket) -> int:
    """Serve the engine at the other end. Exit code as of serve."""
    connection.settimeout(None)
    threading.Thread(target=_end_with_engine, args=(connection.fileno(),), daemon=True).start()
    # imported here, so that the engine's death is noticed while torch loads
    from .executors.link import Link, LinkBroken
    from .executors.service import serve

    try:
        return serve(Link(connection))
    except LinkBroken:
        return 0


def _end_with_engine(connection: int) -> None:
    hangup = select.poll()
    hangup.register(connection, select.POLLRDHUP)
    while not any(event & ~select.POLLIN for _, event in hangup.poll()):
        pass
    os._exit(0)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # at once: what libraries do at the interpreter's end takes longer than the engine waits
    os._exit(code)
