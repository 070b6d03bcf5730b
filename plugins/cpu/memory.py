"""How much memory this process may still take: the least of what the machine and its control groups leave."""

from __future__ import annotations

from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Counts file cache that the kernel would give back as free. 0 where nothing can be read."""
    left = [_machine(proc / "meminfo", "MemAvailable")]
    for folder in _folders(proc / "self/cgroup", cgroups, ""):
        left.append(_left(folder, "memory.max", "memory.current", "inactive_file"))
    for folder in _folders(proc / "self/cgroup", cgroups / "memory", "memory"):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        left.append(_left(folder, *names))
    return max(0, min((n for n in left if n is not None), default=0))


def total_bytes(proc: Path = PROC) -> int:
    """Of the machine; 0 where it cannot be read."""
    return _machine(proc / "meminfo", "MemTotal") or 0


def _machine(meminfo: Path, name: str) -> int | None:
    for line in _lines(meminfo):
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None


def _folders(membership: Path, root: Path, controller: str) -> list[Path]:
    """The folder of this process's group under `root`, and all above it, which bind it as well.

    Inside a container the path is often that of the host and not there; the root is then the container's own.
    """
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = root / path.lstrip("/")
            above = [folder for folder in own.parents if folder.is_relative_to(root)]
            return [own, *above]
    return [root]


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    most, used = _number(folder / limit), _number(folder / usage)
    if most is None or used is None:
        return None
    cache = 0
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == reclaimable:
            cache = int(value)
    return most - used + cache


def _number(path: Path) -> int | None:
    """None also for "max"."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
