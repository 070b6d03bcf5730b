"""How many threads compute: as many as this process may run at once, and no more."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import ceil
from pathlib import Path

from .cgroups import CGROUPS, PROC, controller_folders, read_lines, unified_folders

VARIABLE = "OMP_NUM_THREADS"


def num_threads(
    proc: Path = PROC,
    cgroups: Path = CGROUPS,
    environment: Mapping[str, str] = os.environ,
    num_cpus: int | None = None,
) -> int:
    """OMP_NUM_THREADS where it is set; else the CPUs this process may use, or its quota of them if that is less."""
    asked = environment.get(VARIABLE, "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cpus = _num_cpus() if num_cpus is None else num_cpus
    return max(1, min([cpus, *map(ceil, _quotas(proc, cgroups))]))


def _num_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(proc: Path, cgroups: Path) -> list[float]:
    """CPUs' worth of time a period that each control group grants; those that grant all left out."""
    pairs = [_words(folder / "cpu.max") for folder in unified_folders(proc, cgroups)]
    for folder in controller_folders("cpu", proc, cgroups):
        pairs.append(_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))
    granted = [pair for pair in pairs if len(pair) == 2 and all(word.isdigit() for word in pair)]
    return [int(quota) / int(period) for quota, period in granted]


def _words(path: Path) -> list[str]:
    return " ".join(read_lines(path)).split()
