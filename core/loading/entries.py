"""What the caches hold, for listing and removing: hub models, files out of wheels, and what was converted."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CacheNotFound, scan_cache_dir

from ..errors import ModelNotFound
from .cache import Cache, guard_disk, read_json
from .source import DEFAULT_MODEL, DEFAULT_WHEEL

_LEFT_OVER_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One model in the caches."""

    name: str
    """As `serve` takes it."""
    num_bytes: int
    paths: tuple[Path, ...]
    """Folders and files that are this model's alone."""


def list_entries(cache: Cache) -> Sequence[CacheEntry]:
    """Sorted by name; the folder made from a .gguf counts as part of the model."""
    paths: dict[str, list[Path]] = {}
    for name, path in (*_hub_paths(), *_wheel_paths(cache), *_converted_paths(cache)):
        paths.setdefault(name, []).append(path)
    return [
        CacheEntry(name, sum(map(_num_bytes, found)), tuple(found))
        for name, found in sorted(paths.items())
    ]


def remove_entry(cache: Cache, name: str) -> int:
    """Delete a model and what was made from it; the bytes freed. The default model goes under both of its names.

    A local .gguf stays; what was converted from it goes. Raises ModelNotFound, which lists what there is.
    """
    entries = list_entries(cache)
    names = {name, str(DEFAULT_WHEEL)} if name == str(DEFAULT_MODEL) else {name}
    chosen = [entry for entry in entries if entry.name in names]
    if not chosen:
        known = ", ".join(entry.name for entry in entries) or "nothing"
        raise ModelNotFound(f"{name!r} is not in the cache, which holds: {known}.")
    for entry in chosen:
        for path in entry.paths:
            with guard_disk(path):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
    _remove_left_overs(cache)
    return sum(entry.num_bytes for entry in chosen)


def _hub_paths() -> Iterator[tuple[str, Path]]:
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return
    yield from ((repo.repo_id, repo.repo_path) for repo in repos if repo.repo_type == "model")


def _wheel_paths(cache: Cache) -> Iterator[tuple[str, Path]]:
    for path in cache.wheels.glob("*==*/*.gguf"):
        yield f"pypi:{path.parent.name}/{path.name}", path


def _converted_paths(cache: Cache) -> Iterator[tuple[str, Path]]:
    for record in cache.converted.glob("*/source.json"):
        name = read_json(record).get("name")
        if not record.parent.name.startswith("."):
            yield name if isinstance(name, str) else record.parent.name, record.parent


def _num_bytes(path: Path) -> int:
    """On disk; links count as links."""
    if path.is_dir():
        return sum(item.lstat().st_size for item in path.rglob("*") if not item.is_dir())
    return path.stat().st_size


def _remove_left_overs(cache: Cache) -> None:
    """What processes that were killed have left half-made."""
    for path in (*cache.wheels.glob("**/.new-*"), *cache.converted.glob(".new-*")):
        if time.time() - path.stat().st_mtime > _LEFT_OVER_S:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
