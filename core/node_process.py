"""A rank that torchrun started beside rank 0: `chipset serve` becomes `python -m chipset.core.node_process` there.

It runs a worker for one engine after the other, until one tells it to close.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress

from .executors.peers import COMMAND
from .executors.torchrun import join, offer_store, read_offer
from .nodes import Nodes

WAIT_S = 600.0
"""For an engine, before it is taken for gone for good."""
POLL_S = 0.5


def main() -> int:
    """Exit code 0 once an engine has ended in order; 1 where none comes any more."""
    nodes = Nodes.read(os.environ)
    assert nodes is not None, "only torchrun starts this"
    store = offer_store(nodes)
    deadline, last = time.monotonic() + WAIT_S, b""
    while time.monotonic() < deadline:
        offer = read_offer(store)
        if offer.secret != last:
            # one that has just ended may not listen any more
            with suppress(OSError):
                connection, environment = join(offer, nodes.rank)
                last = offer.secret
                with connection:
                    code = _work(connection.fileno(), environment)
                if code == 0:
                    return 0
                deadline = time.monotonic() + WAIT_S
        time.sleep(POLL_S)
    return 1


def _work(connection: int, environment: dict[str, str]) -> int:
    """Exit code of a worker on that link; it ends with this process, by a pipe that nobody writes to."""
    theirs, ours = os.pipe()
    try:
        worker = subprocess.Popen(
            [*COMMAND, str(connection), str(theirs)],
            stdin=subprocess.DEVNULL,
            pass_fds=(connection, theirs),
            env={**os.environ, **environment},
        )
        os.close(theirs)
        return worker.wait()
    finally:
        os.close(ours)


if __name__ == "__main__":
    sys.exit(main())
