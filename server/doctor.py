"""`chipset doctor`: this machine, every backend, the versions, the compilers and the cache; loads no plugin itself.

Where a model is named, an engine loads it, and what it takes is told, too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec

from .. import __version__
from ..backends.matrix import Level, Matrix, Row
from ..backends.options import BACKENDS
from ..backends.plugin import Probe
from ..backends.probing import Finding
from ..backends.registry import Registry
from ..core.loading.cache import Cache
from ..core.loading.entries import list_entries
from ..core.messages import Ready
from . import tables
from .console import human_bytes, weight_rows
from .machine import Machine
from .matrix import State, installed_modules, proofs
from .versions import Package, installed_version, required_packages


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenVersion:
    """A package that a backend needs, beside the versions that it was seen working with."""

    package: str
    installed: str | None
    seen: str
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendReport:
    """One backend: can it serve here, and if not, why and what to do."""

    name: str
    installed: bool
    available: bool
    reason: str
    cure: str
    summary: str
    distribution: str
    version: str
    found_hardware: bool
    simulated: bool
    architecture: str
    num_devices: int
    priority: int
    evidence: Mapping[Level, State]
    """The reports behind the matrix's claims; empty where it claims nothing."""
    versions: tuple[SeenVersion, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheReport:
    """Where models are kept."""

    folder: Path
    model_bytes: int
    """Of all models, also in the hub's own cache."""
    free_bytes: int
    """On the folder's disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """All that `chipset doctor` tells."""

    chipset: str
    machine: Machine
    backends: tuple[BackendReport, ...]
    packages: tuple[Package, ...]
    compilers: Mapping[str, str | None]
    """Program to where it is; None: not on the PATH."""
    cache: CacheReport
    model: Ready | None = None
    """What an engine said that loaded the model in question."""

    @property
    def can_serve(self) -> bool:
        """Is any backend there that is not a simulator?"""
        return any(one.available and not one.simulated for one in self.backends)

    def as_json(self) -> str:
        """The whole of it."""
        told = asdict(replace(self, model=None)) | {"model": msgspec.to_builtins(self.model)}
        return json.dumps(told, indent=2, default=str)

    def as_text(self, width: int | None = None) -> str:
        """For people; wrapped to `width`."""
        parts = (
            (("chipset", self.chipset), _machine(self)),
            (("backend", "state", "evidence", "what was found, and what to do"), _backends(self)),
            (("package", "installed", "wanted", ""), _packages(self)),
            *(
                []
                if self.model is None
                else [(("model", self.model.architecture), _model(self.model))]
            ),
        )
        return "\n\n".join(tables.aligned(head, list(rows), width) for head, rows in parts)


def diagnose(registry: Registry, cache: Cache) -> Diagnosis:
    """Look at everything. Plugins are asked by a helper process, which takes 5 s where one of them hangs."""
    matrix = Matrix.load()
    # what is installed, then what is only planned
    rows = {finding.name: finding for finding in registry.probe_all()}
    for name in registry.excluded:
        rows[name] = _unasked(name, "left out by CHIPSET_PLUGINS", f"add {name} to it, or unset it")
    for name in (*BACKENDS, *matrix.rows):
        absent = _unasked(
            name, "no plugin of that name is installed", "install a distribution that brings it"
        )
        rows.setdefault(name, absent)
    installed = {*registry.names, *registry.excluded}
    modules = installed_modules()
    return Diagnosis(
        chipset=__version__,
        machine=Machine.read(),
        backends=tuple(
            _backend(finding, name in installed, matrix.rows.get(name), modules)
            for name, finding in rows.items()
        ),
        packages=tuple(required_packages()),
        compilers={name: shutil.which(name) for name in matrix.compilers},
        cache=_cache(cache),
    )


def _unasked(name: str, reason: str, cure: str) -> Finding:
    return Finding(
        name=name, distribution="", version="", summary="", probe=None, reason=reason, cure=cure
    )


def _backend(
    finding: Finding, installed: bool, row: Row | None, modules: Mapping[str, str]
) -> BackendReport:
    probe = finding.probe or Probe(available=False, num_devices=0, reason="")
    return BackendReport(
        name=finding.name,
        installed=installed,
        available=probe.available,
        reason=finding.reason,
        cure=finding.cure,
        summary=finding.summary or (row.summary if row else ""),
        distribution=finding.distribution,
        version=finding.version,
        found_hardware=probe.found_hardware,
        simulated=probe.simulated,
        architecture=probe.architecture,
        num_devices=probe.num_devices,
        priority=probe.priority,
        evidence={one.level: one.state for one in proofs(row, modules)} if row else {},
        versions=tuple(_seen_versions(row)) if row else (),
    )


def _seen_versions(row: Row) -> Iterator[SeenVersion]:
    for windows in row.versions.values():
        for package, window in windows.items():
            version = installed_version(package)
            yield SeenVersion(
                package=package,
                installed=version,
                seen=str(window),
                fits=version is not None and window.holds(version),
            )


def _cache(cache: Cache) -> CacheReport:
    there = next(path for path in (cache.root, *cache.root.absolute().parents) if path.exists())
    return CacheReport(
        folder=cache.root,
        model_bytes=sum(entry.num_bytes for entry in list_entries(cache)),
        free_bytes=shutil.disk_usage(there).free,
    )


def _machine(diagnosis: Diagnosis) -> Iterator[Sequence[str]]:
    machine, cache = diagnosis.machine, diagnosis.cache
    yield "system", f"{machine.system}, {machine.kernel}, {machine.architecture}"
    yield "processor", f"{machine.processor}; {machine.usable_cores} of {machine.cores} cores"
    limit = machine.memory_limit_bytes
    yield (
        "memory",
        f"{_size(machine.memory_bytes)}, {_size(machine.available_bytes)} available"
        + ("" if limit is None else f"; control groups allow {_size(limit)}"),
    )
    yield "python", f"{machine.python}, {machine.executable}"
    found = [f"{name} ({path})" for name, path in diagnosis.compilers.items() if path]
    yield "compilers", ", ".join(found) or "none"
    absent = [name for name, path in diagnosis.compilers.items() if not path]
    yield "not found", ", ".join(absent) or "–"
    free = f"{_size(cache.free_bytes)} free on its disk"
    yield "cache", f"{cache.folder}; {_size(cache.model_bytes)} of models, {free}"


def _backends(diagnosis: Diagnosis) -> Iterator[Sequence[str]]:
    for one in diagnosis.backends:
        state = "available" if one.available else "unavailable" if one.installed else "absent"
        if one.simulated and one.available:
            state = "simulated"
        evidence = ", ".join(f"{level} ({state})" for level, state in one.evidence.items())
        unseen = [
            f"{v.package} {v.installed or 'is missing'}, seen with {v.seen}"
            for v in one.versions
            if one.installed and not v.fits
        ]
        said = "; ".join(text for text in (one.reason, one.cure, *unseen) if text)
        yield one.name, state, evidence or "none", said


def _packages(diagnosis: Diagnosis) -> Iterator[Sequence[str]]:
    for one in diagnosis.packages:
        verdict = "" if one.fits else "too old" if one.installed else "missing"
        if one.optional and not one.installed:
            verdict = "optional"
        yield one.name, one.installed or "–", one.wanted, verdict


def _model(ready: Ready) -> Iterator[Sequence[str]]:
    yield from weight_rows(ready)
    yield "bytes", ", ".join(map(str, ready.rank_weight_bytes)) + " of weights, by rank"
    yield "backend", f"{ready.backend} on {ready.device}, {ready.dtype}"
    yield (
        "KV cache",
        f"{ready.kv_tokens} tokens in {human_bytes(ready.kv_bytes)} of {ready.kv_dtype} on each rank",
    )


def _size(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else human_bytes(num_bytes)
