"""What this machine is: system, processor, memory, and what control groups leave of it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Facts, as far as they can be read."""

    system: str
    kernel: str
    architecture: str
    processor: str
    cores: int
    """Of the machine."""
    usable_cores: int
    """That this process may run on."""
    memory_bytes: int | None
    available_bytes: int | None
    """Of the machine's memory; file cache that can be given back counts."""
    memory_limit_bytes: int | None
    """The least limit of the control groups of this process; None: none binds."""
    python: str
    executable: str

    @classmethod
    def read(cls, proc: Path = PROC, cgroups: Path = CGROUPS) -> Machine:
        """The one that this process runs on."""
        memory = _bytes_by_name(proc / "meminfo")
        total = memory.get("MemTotal")
        limits = [n for n in _limits(proc, cgroups) if total is None or n < total]
        cores = os.cpu_count() or 1
        affinity = getattr(os, "sched_getaffinity", None)
        return cls(
            system=_system(),
            kernel=f"{platform.system()} {platform.release()}",
            architecture=platform.machine(),
            processor=_processor(proc),
            cores=cores,
            usable_cores=len(affinity(0)) if affinity else cores,
            memory_bytes=total,
            available_bytes=memory.get("MemAvailable"),
            memory_limit_bytes=min(limits, default=None),
            python=platform.python_version(),
            executable=sys.executable,
        )


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _processor(proc: Path) -> str:
    for line in _lines(proc / "cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def _bytes_by_name(meminfo: Path) -> dict[str, int]:
    pairs = (line.partition(":") for line in _lines(meminfo))
    return {name: int(value.split()[0]) * 1024 for name, _, value in pairs if value.split()}


def _limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """Of the group's own folder and all above it, in both versions of control groups.

    Inside a container the path is often that of the host and not there; the root is then the container's own.
    """
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                name = "memory.limit_in_bytes" if controllers else "memory.max"
                yield from (int(text) for text in _lines(folder / name) if text.isdigit())


def _lines(path: Path) -> list[str]:
    """Empty where the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
