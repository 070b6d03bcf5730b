"""A worker process: `python -m chipset.core.worker_process FD [PIPE]`, started by others and never by hand.

FD is a stream socket to the engine: a WorkerLaunch comes first, then orders. When the other end of it, or of PIPE,
closes, whoever started this is gone, and it ends itself, whatever it does.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence

ALONE = 3
"""Exit code where the other end is gone."""


def main() -> int:
    """Exit code 0 after Close, ALONE, or that of the error that the start failed with."""
    # a terminal's Ctrl-C reaches the whole process group; the API process decides when this one ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ends = [int(one) for one in sys.argv[1:]]
    threading.Thread(target=_end_with_others, args=(ends,), daemon=True).start()
    # imported here, so that the engine's death is noticed while torch loads
    from .executors.link import Link, LinkBroken
    from .executors.service import serve

    connection = socket.socket(fileno=ends[0])
    connection.settimeout(None)
    try:
        return serve(Link(connection))
    except LinkBroken:
        return ALONE


def _end_with_others(ends: Sequence[int]) -> None:
    hangup = select.poll()
    for one in ends:
        hangup.register(one, select.POLLRDHUP)
    hangup.poll()
    os._exit(ALONE)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # at once: what libraries do at the interpreter's end takes longer than the engine waits
    os._exit(code)
