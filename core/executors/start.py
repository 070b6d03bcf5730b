"""From launches to an executor: in this process where one worker does it all, else a process for each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...backends.formats import CheckpointFormat
from ...backends.plugin import Launch, Plugin
from ...backends.reference.rendezvous import serve
from ..files import ModelFiles
from ..models.config import ModelConfig
from ..nodes import Nodes
from ..worker import load_runner, scheme_of
from .executor import Executor, Report
from .peers import Peer, Peers
from .remote import RemoteExecutor
from .torchrun import gather
from .wire import WorkerLaunch

STORE_S = 120.0
"""For workers to meet, after the slowest has imported its libraries."""


def start_executor(
    launches: Sequence[Launch],
    plugin: Plugin,
    config: ModelConfig,
    files: ModelFiles,
    quantize: str | None,
    formats: Sequence[CheckpointFormat],
    report: Report,
    nodes: Nodes | None = None,
) -> Executor:
    """Load the model in every worker; `formats` are those that the plugin brings. Raises what a worker raised.

    `nodes`: processes that wait to be workers, all but rank 0's; None: they are started here.
    """
    scheme = scheme_of(files, quantize, formats)
    if len(launches) == 1:
        return load_runner(launches[0], plugin, config, files, scheme, report)
    store, address = serve(STORE_S) if nodes is None else serve(STORE_S, nodes.address)
    launches = [replace(launch, rendezvous=address) for launch in launches]
    peers = _peers([launch.worker.environment for launch in launches], nodes)
    told = [WorkerLaunch.of(launch, files, quantize) for launch in launches]
    return RemoteExecutor.start(Peers(peers), launches[0], told, report, keep=store)


def _peers(environments: Sequence[Mapping[str, str]], nodes: Nodes | None) -> list[Peer]:
    """By rank."""
    here = range(len(environments)) if nodes is None else range(1)
    peers: list[Peer] = []
    try:
        for rank in here:
            peers.append(Peer.spawn(rank, {**os.environ, **environments[rank]}))
        elsewhere = {} if nodes is None else gather(nodes, environments)
    except BaseException:
        Peers(peers).close(quickly=True)
        raise
    return peers + [Peer(rank, link, None) for rank, link in sorted(elsewhere.items())]
