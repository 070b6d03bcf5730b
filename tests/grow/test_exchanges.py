"""Room to grow: stages that hand activations on, and experts that are spread over ranks."""

from __future__ import annotations

import pytest

from chipset.backends.conformance import exchanges
from chipset.backends.conformance.ranks import run_world
from chipset.backends.errors import Incompatible
from chipset.backends.options import ParallelOptions
from chipset.backends.registry import Registry

from .driver import capabilities_of

RANKS = 2
EXCHANGES = {"send_receive": exchanges.passed_on, "all_to_all": exchanges.exchanged}


def test_two_ranks_exchange_tensors(backend: str) -> None:
    claimed = [name for name in EXCHANGES if name in capabilities_of(backend).collectives]
    if not claimed:
        pytest.skip(f"{backend} claims neither {' nor '.join(EXCHANGES)}")
    plugin = Registry.discover().select(backend).plugin
    try:
        workers = plugin.worker_plan(ParallelOptions(tensor=RANKS), [plugin.probe()])
    except Incompatible as error:
        pytest.skip(f"{backend} has no world of {RANKS}: {error}")
    if len(workers) < RANKS:
        pytest.skip(f"{backend} drives all devices from one process")
    checks = [f"{exchanges.__name__}:{EXCHANGES[name].__name__}" for name in claimed]
    found = run_world(plugin, [backend], RANKS, checks, is_quick=True)[backend]
    errors = [finding.error for name in checks for finding in found[name]]
    assert errors == [""] * RANKS * len(checks)
