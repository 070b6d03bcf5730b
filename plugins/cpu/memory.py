"""How much memory this process may still take: the least of what the machine and its control groups leave."""

from __future__ import annotations

from pathlib import Path

from .cgroups import CGROUPS, PROC, controller_folders, read_lines, unified_folders


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Counts file cache that the kernel would give back as free. 0 where nothing can be read."""
    left = [_machine(proc, "MemAvailable")]
    for folder in unified_folders(proc, cgroups):
        left.append(_left(folder, "memory.max", "memory.current", "inactive_file"))
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for folder in controller_folders("memory", proc, cgroups):
        left.append(_left(folder, *names))
    return max(0, min((n for n in left if n is not None), default=0))


def total_bytes(proc: Path = PROC) -> int:
    """Of the machine; 0 where it cannot be read."""
    return _machine(proc, "MemTotal") or 0


def _machine(proc: Path, name: str) -> int | None:
    for line in read_lines(proc / "meminfo"):
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    most, used = _number(folder / limit), _number(folder / usage)
    if most is None or used is None:
        return None
    cache = 0
    for line in read_lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == reclaimable:
            cache = int(value)
    return most - used + cache


def _number(path: Path) -> int | None:
    """None also for "max"."""
    lines = read_lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None
