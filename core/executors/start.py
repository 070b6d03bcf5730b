"""From launches to an executor: in this process where one worker does it all, else one process a worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from ...backends.formats import CheckpointFormat
from ...backends.plugin import Launch, Plugin
from ...backends.reference.rendezvous import serve
from ..files import ModelFiles
from ..models.config import ModelConfig
from ..worker import load_runner, scheme_of
from .executor import Executor, Report
from .peers import Peer, Peers
from .remote import RemoteExecutor
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
) -> Executor:
    """Load the model in every worker; `formats` are those that the plugin brings. Raises what a worker raised."""
    scheme = scheme_of(files, quantize, formats)
    if len(launches) == 1:
        return load_runner(launches[0], plugin, config, files, scheme, report)
    store, address = serve(STORE_S)
    launches = [replace(launch, rendezvous=address) for launch in launches]
    peers: list[Peer] = []
    try:
        for launch in launches:
            environment = {**os.environ, **launch.worker.environment}
            peers.append(Peer.spawn(launch.worker.rank, environment))
    except BaseException:
        Peers(peers).close(quickly=True)
        raise
    told = [WorkerLaunch.of(launch, files, quantize) for launch in launches]
    return RemoteExecutor.start(Peers(peers), launches[0], told, report, keep=store)
