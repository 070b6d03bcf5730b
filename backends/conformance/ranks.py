"""Worlds of several ranks: processes of the plugin under test, which run checks together and tell what they found."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from ..collectives import Collectives
from ..kv_cache import Cache
from ..options import EngineOptions, ParallelOptions
from ..plugin import Plugin, WorkerSpec
from ..reference.rendezvous import connect, serve
from ..registry import Registry
from ..step import F32, StepInputs
from .modules import Reader
from .session import Session, make_launch
from .suite import small_model
from .tokens import read_tokens

WORLD_S = 240
"""Of a world's life at most, its start included."""
LEAVE_S = 20.0
"""That ranks may outlive the first of them by."""
NUM_BLOCKS = 16
Op = Callable[[Collectives, Tensor], Tensor]
"""What is computed in a step of a tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one rank says of one check."""

    error: str
    """"" where it passed."""
    bits: str
    """Digest of what every rank must have found alike."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a rank is told, as JSON on its standard input."""

    plugins: tuple[str, ...]
    """Each the name of an installed backend, or module:attribute of what makes the plugin; one after another."""
    size: int
    rank: int
    rendezvous: str
    checks: tuple[str, ...]
    """module:function, each called with a Rank; it returns what every rank must find alike."""
    is_quick: bool


class Rank:
    """One process of a world, with a session of the plugin under test."""

    def __init__(self, job: Job, session: Session, store: Store) -> None:
        self.number, self.size, self.is_quick = job.rank, job.size, job.is_quick
        self.session = session
        self.store = store
        """The kit's own; no plugin uses it."""
        self.check = ""
        """The one that runs."""
        self.is_lost = False
        """Whether this rank is out of step, as after anything but a wrong value."""

    @property
    def comm(self) -> Collectives:
        """The backend's."""
        return self.session.backend.comm

    def exchange(self, op: Op, x: Tensor, *, times: int = 1) -> F32:
        """What `op` gives of x, a tensor on the host, inside a step; the last of so many times."""
        shape: list[int] = []
        reader: Reader

        def compute(ids: Tensor, inputs: StepInputs, cache: Cache) -> tuple[Tensor, Cache]:  # noqa: ARG001
            made = op(self.comm, reader.get_buffer("x"))
            shape[:] = made.shape
            return reader.get_buffer("zeros").index_select(0, ids) + made.reshape(1, -1), cache

        zeros = torch.zeros(1, 1, dtype=x.dtype)
        reader = self.session.reader(compute, {"x": x, "zeros": zeros})
        for _ in range(times):
            found = read_tokens(self.session, reader, [0])
        values: F32 = found[0].reshape(shape)
        return values

    def read(self, device: Tensor) -> F32:
        """The values of a tensor on the device, by a step."""
        reader: Reader

        def compute(ids: Tensor, inputs: StepInputs, cache: Cache) -> tuple[Tensor, Cache]:  # noqa: ARG001
            zeros = reader.get_buffer("zeros").index_select(0, ids)
            return zeros + reader.get_buffer("x").reshape(1, -1), cache

        reader = self.session.reader(compute, {"zeros": torch.zeros(1, 1)})
        reader.register_buffer("x", device)
        values: F32 = read_tokens(self.session, reader, [0])[0].reshape(device.shape)
        return values

    def tell(self, finding: Finding) -> None:
        """Of the check that runs."""
        self.store.set(f"{self.check}/{self.number}", json.dumps(asdict(finding)))

    def die(self) -> None:
        """End the process as if it were killed, the check passed."""
        self.tell(Finding(error="", bits="", seconds=0))
        os._exit(0)

    def is_met_by_all(self, place: str) -> bool:
        """Wait until all ranks are at `place`, without the plugin: whether none of them is lost."""
        self.store.set(f"{place}/{self.number}", "lost" if self.is_lost else "here")
        found = [self.store.get(f"{place}/{rank}") for rank in range(self.size)]
        return b"lost" not in found


def run_world(
    plugin: Plugin,
    names: Sequence[str],
    size: int,
    checks: Sequence[str],
    *,
    is_quick: bool,
    folders: Sequence[str] = (),
) -> Mapping[str, Mapping[str, Sequence[Finding]]]:
    """By name what each check found, by rank. `names` are how processes find plugins: see Job.plugins.

    The processes are those that `plugin` plans. They look for modules where this one does, and in `folders`. None of
    them outlives the call.
    """
    plan = plugin.worker_plan(ParallelOptions(tensor=size), [plugin.probe()])
    store, address = serve(WORLD_S)
    with ExitStack() as stack:
        started = []
        for worker in plan:
            log = stack.enter_context(tempfile.TemporaryFile())
            job = Job(
                plugins=tuple(names),
                size=size,
                rank=worker.rank,
                rendezvous=address,
                checks=tuple(checks),
                is_quick=is_quick,
            )
            started.append((_start(job, worker, folders, log, stack), log))
        _wait([process for process, _ in started])
        ended = [_last_words(process, log) for process, log in started]
        return {name: _findings(_kept_for(name, store), checks, ended) for name in names}


def _start(
    job: Job, worker: WorkerSpec, folders: Sequence[str], log: IO[bytes], stack: ExitStack
) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([*folders, *filter(None, sys.path)])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **worker.environment, "PYTHONPATH": path}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env=environment,
    )
    stack.callback(_end, process)
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:  # its log says why it ended
        pipe.write(json.dumps(asdict(job)).encode())
    return process


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or the first one long ago."""
    deadline = time.monotonic() + WORLD_S
    is_first = True
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if is_first and any(process.poll() is not None for process in processes):
            deadline, is_first = min(deadline, time.monotonic() + LEAVE_S), False
        time.sleep(0.02)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def _last_words(process: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    code = process.poll()
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    how = "did not end" if code is None else f"ended with {code}"
    return f"its process {how} before it told" + (f", and said: {lines[-1]}" if lines else "")


def _findings(
    store: Store, checks: Sequence[str], last_words: Sequence[str]
) -> Mapping[str, Sequence[Finding]]:
    """Of one plugin; a rank that did not tell has its last words taken."""

    def finding(check: str, rank: int) -> Finding:
        key = f"{check}/{rank}"
        if not store.check([key]):
            return Finding(error=last_words[rank], bits="", seconds=0)
        return Finding(**json.loads(store.get(key)))

    return {check: [finding(check, rank) for rank in range(len(last_words))] for check in checks}


def _kept_for(plugin: str, store: Store) -> PrefixStore:
    """What the kit keeps for a plugin in the store where its ranks meet."""
    return PrefixStore(f"kit/{plugin}", store)


def main() -> None:
    """What a rank runs."""
    told = json.load(sys.stdin)
    job = Job(**{**told, "plugins": tuple(told["plugins"]), "checks": tuple(told["checks"])})
    signal.alarm(WORLD_S)  # whatever hangs, and whoever started this may be gone
    store = connect(job.rendezvous, WORLD_S)
    for name in job.plugins:
        _run_all(job, name, _kept_for(name, store))


def _run_all(job: Job, name: str, store: Store) -> None:
    """The checks, of one plugin."""
    plugin = _find(name)
    options = EngineOptions(parallel=ParallelOptions(tensor=job.size))
    launch = make_launch(plugin, small_model(), options, rank=job.rank, rendezvous=job.rendezvous)
    pair = tuple(rank for rank in range(job.size) if rank // 2 == job.rank // 2)
    launch = replace(launch, groups={**launch.groups, "pair": pair})
    session = Session(plugin, launch.model, launch=launch, num_blocks=NUM_BLOCKS)
    rank = Rank(job, session, store)
    for check in job.checks:
        if not rank.is_met_by_all(f"before {check}"):
            break
        rank.check = check
        rank.tell(_run(rank))
    session.close()


def _run(rank: Rank) -> Finding:
    module, _, name = rank.check.partition(":")
    began = time.monotonic()
    try:
        alike: Sequence[F32] = getattr(import_module(module), name)(rank) or ()
    except Exception as error:  # whatever a plugin raises is a finding
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = str(error).partition("\n")[0]
        where = f" ({Path(place.filename).name}:{place.lineno})"
        rank.is_lost = not isinstance(error, AssertionError)
        said = f"{type(error).__name__}: {words}{where}" if rank.is_lost else words
        return Finding(error=said, bits="", seconds=time.monotonic() - began)
    held = b"".join(np.ascontiguousarray(one).tobytes() for one in alike)
    bits = hashlib.sha256(held).hexdigest()[:16] if held else ""
    return Finding(error="", bits=bits, seconds=time.monotonic() - began)


def _find(name: str) -> Plugin:
    module, _, attribute = name.partition(":")
    if not attribute:
        return Registry.discover().select(name).plugin
    make: Any = attrgetter(attribute)(import_module(module))
    plugin: Plugin = make()
    return plugin


if __name__ == "__main__":
    main()
