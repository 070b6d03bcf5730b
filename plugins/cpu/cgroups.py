"""Control groups, of both versions: the folders whose limits bind this process."""

from __future__ import annotations

from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def unified_folders(proc: Path = PROC, cgroups: Path = CGROUPS) -> list[Path]:
    """Of version 2: the group's own folder and all above it."""
    return _folders(proc, cgroups, "")


def controller_folders(controller: str, proc: Path = PROC, cgroups: Path = CGROUPS) -> list[Path]:
    """Of version 1, which has a tree for each controller."""
    return _folders(proc, cgroups / controller, controller)


def read_lines(path: Path) -> list[str]:
    """Empty where the file cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _folders(proc: Path, root: Path, controller: str) -> list[Path]:
    """Inside a container the path is often that of the host and not there; the root is then the container's own."""
    for line in read_lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = root / path.lstrip("/")
            return [own, *(folder for folder in own.parents if folder.is_relative_to(root))]
    return [root]
