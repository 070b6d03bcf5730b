"""How many threads compute: as many as this process may run at once, and no more."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import ceil
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
VARIABLE = "OMP_NUM_THREADS"


def num_threads(
    cgroups: Path = CGROUPS,
    environment: Mapping[str, str] = os.environ,
    num_cpus: int | None = None,
) -> int:
    """OMP_NUM_THREADS where it is set; else the CPUs this process may use, or its quota of them if that is less."""
    asked = environment.get(VARIABLE, "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cpus = _num_cpus() if num_cpus is None else num_cpus
    quota = _quota(cgroups)
    return cpus if quota is None else max(1, min(cpus, ceil(quota)))


def _num_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(cgroups: Path) -> float | None:
    """CPUs' worth of time a period that the control group grants; None where it grants all."""
    both = _words(cgroups / "cpu.max")
    if not both:
        both = _words(cgroups / "cpu/cpu.cfs_quota_us") + _words(cgroups / "cpu/cpu.cfs_period_us")
    if len(both) != 2 or not all(word.isdigit() for word in both):
        return None
    return int(both[0]) / int(both[1])


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
