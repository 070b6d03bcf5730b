"""Worker plans that most plugins need: what processes which share a host must be told. Imports no torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import Incompatible
from ..plugin import Probe, WorkerSpec

THREADS = "OMP_NUM_THREADS"
INTERFACE = "GLOO_SOCKET_IFNAME"
LOOPBACK = "lo"


def sharing_hosts(
    plan: Sequence[WorkerSpec], num_threads: int, environment: Mapping[str, str] = os.environ
) -> list[WorkerSpec]:
    """The plan, its workers told to share `num_threads` of their host, and to stay on it where there is one host only.

    Variables that the user set stay as they are, and a single worker is told nothing. Hosts are taken to be alike.
    """
    per_host = Counter(worker.host for worker in plan)
    if len(plan) == 1:
        return list(plan)
    shared = {INTERFACE: LOOPBACK} if len(per_host) == 1 else {}
    told = []
    for worker in plan:
        threads = {THREADS: str(max(1, num_threads // per_host[worker.host]))}
        fresh = {k: v for k, v in (shared | threads).items() if not environment.get(k)}
        told.append(replace(worker, environment={**worker.environment, **fresh}))
    return told


def spread(num_ranks: int, num_hosts: int, most_per_host: int) -> list[WorkerSpec]:
    """Ranks dealt evenly to the hosts, in their order, all on device 0 of theirs. Raises Incompatible."""
    if num_ranks > most_per_host * num_hosts:
        raise Incompatible(
            f"{num_ranks} shards: at most {most_per_host} processes run on a host, of which there are {num_hosts}; "
            "lower the number of shards"
        )
    least, more = divmod(num_ranks, num_hosts)
    places = [(host, local) for host in range(num_hosts) for local in range(least + (host < more))]
    return [
        WorkerSpec(rank=rank, local_rank=local, host=host, devices=(0,))
        for rank, (host, local) in enumerate(places)
    ]


def one_worker(num_ranks: int, hosts: Sequence[Probe]) -> list[WorkerSpec]:
    """An SPMD plan: one worker that drives so many devices of the first host. Raises Incompatible."""
    found = hosts[0].num_devices
    if num_ranks > found:
        raise Incompatible(
            f"{num_ranks} devices wanted, {found} found on the host; lower the number of shards"
        )
    return [WorkerSpec(rank=0, local_rank=0, host=0, devices=tuple(range(num_ranks)))]
