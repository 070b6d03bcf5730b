"""Real workers of a real engine process: where they listen, and how they end with it and it with them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq
from fakes import submit

from chipset.backends.options import EngineOptions, ParallelOptions
from chipset.core.conformance.checkpoint import FULL, make_checkpoint
from chipset.core.messages import Fatal, Ready, StepDone, encode_launch

from ..test_process import Parent, make_launch

LIMIT_S = 10


class Served:
    """An engine process of two ranks that is ready."""

    def __init__(self, folder: Path) -> None:
        options = EngineOptions(
            dtype="float32", kv_bytes=2**20, max_context=64, parallel=ParallelOptions(tensor=2)
        )
        launch = make_launch(folder, files=make_checkpoint(FULL, folder / "m"), options=options)
        self.parent = Parent(launch)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "chipset.core.process"], stdin=subprocess.PIPE
        )
        assert self.process.stdin is not None
        self.process.stdin.write(encode_launch(launch) + b"\n")
        self.process.stdin.flush()
        self.parent.events.setsockopt(zmq.RCVTIMEO, 120_000)  # three processes import torch
        self.ready = self.parent.receive(Ready)
        self.workers = psutil.Process(self.process.pid).children()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.parent.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    one = Served(tmp_path)
    yield one
    one.close()


def listening(process: psutil.Process) -> list[str]:
    return [c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"]


def test_they_draw_together_reached_from_this_machine_alone_and_end_the_engine_when_one_dies(
    served: Served,
) -> None:
    assert len(served.ready.rank_weight_bytes) == len(served.workers) == 2
    served.parent.send(submit(1, [5, 6, 7], 3))
    drawn = [served.parent.receive(StepDone).outputs[0] for _ in range(3)]
    assert drawn[-1].finish_reason == "length"
    addresses = [
        ip for p in (psutil.Process(served.process.pid), *served.workers) for ip in listening(p)
    ]
    assert addresses
    assert set(addresses) == {"127.0.0.1"}
    served.workers[1].kill()
    fatal = served.parent.receive(Fatal)
    assert fatal.message == "WorkerDied: worker 1 ended: killed by SIGKILL"
    assert served.process.wait(LIMIT_S) == 1
    _, alive = psutil.wait_procs(served.workers, timeout=LIMIT_S)
    assert not alive


@pytest.mark.parametrize("how", ["killed", "left"])
def test_they_end_with_their_engine(served: Served, how: str) -> None:
    if how == "killed":
        served.process.kill()
    else:
        assert served.process.stdin is not None
        served.process.stdin.close()
    served.process.wait(LIMIT_S)
    _, alive = psutil.wait_procs(served.workers, timeout=LIMIT_S)
    assert not alive
