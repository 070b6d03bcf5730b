"""Plugins whose mistakes take several ranks, and the whole ones, run one after another by the same few processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from chipset.backends.conformance import exchanges
from chipset.backends.conformance.collectives import ALWAYS, NEEDS, Worlds
from chipset.backends.conformance.ranks import Finding, run_world

from .areas import MUTATIONS
from .mutation import importable_name
from .outcomes import ROOT, WHOLE
from .reference_plugin import NUM_DEVICES, ReferencePlugin

SHARING = (
    *(mutation.importable for mutation in MUTATIONS if mutation.importable and not mutation.kills),
    *map(importable_name, WHOLE.values()),
)
"""By the name that other processes find it by. Whoever kills its ranks can share none."""


def world_of(importable: str) -> Worlds:
    """What CollectivesSuite would start processes for; {} where it has to."""
    return {NUM_DEVICES: _run()[importable]} if importable in SHARING else {}


@cache
def _run() -> Mapping[str, Mapping[str, Sequence[Finding]]]:
    checks = [f"{exchanges.__name__}:{name}" for name in (*ALWAYS, *NEEDS)]
    whole, folders = ReferencePlugin(), [str(ROOT)]
    return run_world(whole, SHARING, NUM_DEVICES, checks, is_quick=True, folders=folders)
