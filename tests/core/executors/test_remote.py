"""Many workers behind the face of one: what they draw, how they fail, and how they end."""

import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from fakes import NullRunner, continuation, null_engine, submit

from chipset.backends.step import StepBatch
from chipset.core.errors import NotEnoughMemory, WorkerDied
from chipset.core.executors.link import Link, LinkBroken
from chipset.core.executors.peers import END_S, Peer, Peers
from chipset.core.executors.remote import RemoteExecutor, StepRaised
from chipset.core.executors.service import serve
from chipset.core.executors.wire import Close
from chipset.core.models.report import WeightReport

SCRIPT = Path(__file__).with_name("scripted.py")
NUM_BLOCKS = 64
LIMIT_S = 10


class Worker(NullRunner):
    """A null device of one rank."""

    weights = (WeightReport(held_bytes=5),)
    free = 1000
    closed = False

    def budget(self) -> int:
        return self.free + self.launch.worker.rank

    def block_bytes(self) -> list[int]:
        return [10 + self.launch.worker.rank]

    def allocate(self, num_blocks: Sequence[int]) -> None:
        self.allocated = list(num_blocks)

    def warm_up(self, num_blocks: int, progress) -> None:
        progress(1, num_blocks)

    def counters(self) -> dict[str, float]:
        return {"compiles": 2.0, f"of rank {self.launch.worker.rank}": 1.0}

    def close(self) -> None:
        self.closed = True


@contextmanager
def in_threads(*workers: NullRunner) -> Iterator[RemoteExecutor]:
    """Each worker behind a link, in a thread of this process."""
    peers, threads = [], []
    for rank, worker in enumerate(workers):
        object.__setattr__(worker.launch.worker, "rank", rank)
        ours, theirs = socket.socketpair()

        def work(connection: socket.socket = theirs, worker: NullRunner = worker) -> None:
            link = Link(connection)
            with suppress(LinkBroken):
                serve(link, lambda _: worker)
            link.close()

        thread = threading.Thread(target=work)
        thread.start()
        threads.append(thread)
        peers.append(Peer(rank, ours, None))
    executor = RemoteExecutor.start(Peers(peers), workers[0].launch, [], lambda *_: None)
    try:
        yield executor
    finally:
        executor.close()
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()


def workers(count: int, **fields: object) -> list[Worker]:
    return [Worker(null_engine().runner.launch, [NUM_BLOCKS], **fields) for _ in range(count)]


def test_all_are_asked_and_the_poorest_counts() -> None:
    two = workers(2)
    with in_threads(*two) as executor:
        told: list[tuple[int, int]] = []
        assert executor.budget() == 1000
        assert executor.block_bytes() == [11]
        executor.allocate([9])
        executor.warm_up(3, lambda done, total: told.append((done, total)))
        assert [one.allocated for one in two] == [[9], [9]]
        assert told == [(1, 3)]
        assert [one.held_bytes for one in executor.weights] == [5, 5]
        assert executor.counters() == {"compiles": 4.0, "of rank 0": 1.0, "of rank 1": 1.0}
        executor.check()
    assert [one.closed for one in two] == [True, True]


def test_every_rank_gets_every_step_and_the_first_ones_ids_are_taken() -> None:
    two = workers(2)
    engine = null_engine()
    with in_threads(*two) as executor:
        engine.runner = executor
        drawn: dict[int, list[int]] = {}
        for number in range(5):
            engine.submit(submit(number, [number, 7, 9], 12))
        while not engine.is_idle:
            for output in engine.step():
                drawn.setdefault(output.request_id, []).extend(t.id for t in output.tokens)
        engine.check()
    assert drawn == {n: continuation([n, 7, 9], 12) for n in range(5)}
    assert len(two[0].steps) == len(two[1].steps) > 0
    assert [slot for slot, _ in two[0].resets] == [slot for slot, _ in two[1].resets] != []


def marked(batch: StepBatch) -> Exception | None:
    return ValueError("a bad token") if 999 in batch.token_ids else None


def one_step(executor: RemoteExecutor, *prompts: list[int]) -> object:
    engine = null_engine()
    engine.runner = executor
    for number, prompt in enumerate(prompts):
        engine.submit(submit(number, prompt, 4))
    return engine.step()


def test_a_request_that_fails_in_all_of_them_ends_alone() -> None:
    two = workers(2, fault=marked)
    engine = null_engine()
    with in_threads(*two) as executor:
        engine.runner = executor
        for number in range(4):
            engine.submit(submit(number, [number, 999 if number == 2 else 5], 6))
        ends = {}
        while not engine.is_idle:
            for output in engine.step():
                if output.finish_reason:
                    ends[output.request_id] = output.finish_reason
    assert ends == {0: "length", 1: "length", 2: "error", 3: "length"}


def test_a_step_that_fails_in_one_of_them_ends_the_engine() -> None:
    first, second = workers(1) + workers(1, fault=marked)
    with in_threads(first, second) as executor, pytest.raises(StepRaised, match="a bad token"):
        one_step(executor, [1, 999])


def test_a_lost_device_is_not_waited_for() -> None:
    blocked = threading.Event()

    def stuck(batch: StepBatch) -> None:
        blocked.wait(LIMIT_S)

    two = workers(1, fault=stuck) + workers(1, fault=marked, meaning="device_lost")
    with in_threads(*two) as executor:
        begun = time.monotonic()
        with pytest.raises(StepRaised) as caught:
            one_step(executor, [1, 999])
        assert time.monotonic() - begun < LIMIT_S / 2
        assert executor.classify(caught.value) == "device_lost"
        blocked.set()


def test_a_cache_that_one_of_them_lost_is_told() -> None:
    with in_threads(*workers(1), *workers(1, loses_cache=True)) as executor:
        assert executor.replace_lost_cache()
    with in_threads(*workers(2)) as executor:
        assert not executor.replace_lost_cache()


def num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def in_processes(*modes: str) -> Iterator[tuple[RemoteExecutor, list[psutil.Process]]]:
    """Scripted workers, of which nothing may be left."""
    launch = null_engine().runner.launch
    gc.collect()
    before = set(psutil.Process().children())
    files = num_files()
    peers = [
        Peer.spawn(rank, os.environ, [sys.executable, str(SCRIPT), mode])
        for rank, mode in enumerate(modes)
    ]
    processes = [psutil.Process(peer.process.pid) for peer in peers if peer.process]
    executor = None
    try:
        executor = RemoteExecutor.start(Peers(peers), launch, [], lambda *_: None)
        yield executor, processes
    finally:
        if executor is not None:
            executor.close()
        assert set(psutil.Process().children()) <= before, "a worker was left behind"
        # what other tests forgot may be closed meanwhile
        assert num_files() <= files, "a socket was left behind"


def test_workers_that_are_told_to_close_end_by_themselves() -> None:
    with in_processes("serve", "serve") as (executor, processes):
        assert executor.budget() == 42
        begun = time.monotonic()
        executor.close()
        assert time.monotonic() - begun < END_S
        assert not any(one.is_running() for one in processes)


def test_one_that_cannot_start_says_why() -> None:
    with pytest.raises(NotEnoughMemory, match="x") as caught, in_processes("serve", "fail"):
        pass
    assert caught.value.__notes__ == ["T"]


def test_one_that_ends_is_named_with_its_code() -> None:
    died = pytest.raises(WorkerDied, match="worker 1 ended: exit code 3")
    with in_processes("serve", "die") as (executor, _), died:
        executor.budget()


def test_one_that_babbles_ends_the_engine() -> None:
    died = pytest.raises(WorkerDied, match="worker 0 sent what is no message")
    with in_processes("babble", "serve") as (executor, _), died:
        executor.budget()


def test_one_that_is_killed_between_steps_is_seen_at_once() -> None:
    with in_processes("serve", "serve") as (executor, processes):
        executor.check()
        processes[0].kill()
        time.sleep(0.2)
        with pytest.raises(WorkerDied, match="worker 0 ended: killed by SIGKILL"):
            executor.check()


def test_one_that_stops_is_noticed_within_ten_seconds() -> None:
    with in_processes("serve", "serve") as (executor, processes):
        executor.warm_up(1, lambda *_: None)
        processes[1].send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(WorkerDied, match="worker 1 gave no sign of life"):
            executor.budget()
        assert 4 < time.monotonic() - begun < LIMIT_S


def idle(executor: RemoteExecutor) -> None:
    for _ in range(5 * LIMIT_S):
        executor.check()
        time.sleep(0.2)


def test_one_that_stops_while_nothing_runs_is_noticed_too() -> None:
    with in_processes("serve", "silent") as (executor, _):
        executor.warm_up(1, lambda *_: None)
        with pytest.raises(WorkerDied, match="worker 1 gave no sign of life"):
            idle(executor)


def test_a_link_takes_frames_in_any_parts() -> None:
    ours, theirs = socket.socketpair()
    link = Link(ours)
    sender = Link(theirs)
    frames = [b"", b"a" * 10, bytes(300_000), Close.__name__.encode()]
    thread = threading.Thread(target=lambda: [sender.send(one) for one in frames])
    thread.start()
    got: list[bytes] = []
    while len(got) < len(frames):
        got += link.pull()
    thread.join()
    assert got == frames
    sender.close()
    with pytest.raises(LinkBroken, match="hung up"):
        link.receive()
    link.close()


def test_a_frame_that_is_too_long_breaks_the_link() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall((2**40).to_bytes(8, "little"))
    with ours, theirs, pytest.raises(LinkBroken, match="a frame of"):
        Link(ours).receive()
