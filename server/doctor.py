"""`chipset doctor`: this machine, every backend, the versions, the compilers and the cache; loads no plugin itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import __version__
from ..backends.matrix import Level, Matrix, Row
from ..backends.options import BACKENDS
from ..backends.probing import Finding
from ..backends.registry import Registry
from ..core.loading.cache import Cache
from ..core.loading.entries import list_entries
from . import tables
from .console import human_bytes
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
    found_hardware: bool = False
    simulated: bool = False
    architecture: str = ""
    num_devices: int = 0
    priority: int = 0
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

    @property
    def can_serve(self) -> bool:
        """Is any backend there that is not a simulator?"""
        return any(one.available and not one.simulated for one in self.backends)

    def as_json(self) -> str:
        """The whole of it."""
        return json.dumps(asdict(self), indent=2, default=str)

    def as_text(self, width: int | None = None) -> str:
        """For people; wrapped to `width`."""
        parts = (
            (("chipset", self.chipset), _machine(self)),
            (("backend", "state", "evidence", "what was found, and what to do"), _backends(self)),
            (("package", "installed", "wanted", ""), _packages(self)),
        )
        return "\n\n".join(tables.aligned(head, list(rows), width) for head, rows in parts)


def diagnose(registry: Registry, cache: Cache) -> Diagnosis:
    """Look at everything. Plugins are asked by a helper process, which takes 5 s where one of them hangs."""
    matrix = Matrix.load()
    findings = {finding.name: finding for finding in registry.probe_all()}
    modules = installed_modules()
    # what is installed, then what only is planned
    names = [*findings, *(n for n in (*BACKENDS, *matrix.rows) if n not in findings)]
    return Diagnosis(
        chipset=__version__,
        machine=Machine.read(),
        backends=tuple(
            _backend(name, findings.get(name), name in registry.excluded, matrix, modules)
            for name in dict.fromkeys(names)
        ),
        packages=tuple(required_packages()),
        compilers={name: shutil.which(name) for name in matrix.compilers},
        cache=_cache(cache),
    )


def _backend(
    name: str,
    finding: Finding | None,
    is_excluded: bool,
    matrix: Matrix,
    modules: Mapping[str, str],
) -> BackendReport:
    row = matrix.rows.get(name)
    evidence = {} if row is None else {one.level: one.state for one in proofs(row, modules)}
    versions = () if row is None else tuple(_seen_versions(row))
    if finding is None:
        reason, cure = (
            ("left out by CHIPSET_PLUGINS", f"add {name} to it, or unset it")
            if is_excluded
            else ("no plugin of that name is installed", "install a distribution that brings it")
        )
        return BackendReport(
            name=name,
            installed=is_excluded,
            available=False,
            reason=reason,
            cure=cure,
            summary="" if row is None else row.summary,
            distribution="",
            version="",
            evidence=evidence,
            versions=versions,
        )
    probe = finding.probe
    return BackendReport(
        name=name,
        installed=True,
        available=finding.available,
        reason=finding.reason,
        cure=finding.cure,
        summary=finding.summary,
        distribution=finding.distribution,
        version=finding.version,
        found_hardware=probe is not None and probe.found_hardware,
        simulated=probe is not None and probe.simulated,
        architecture="" if probe is None else probe.architecture,
        num_devices=0 if probe is None else probe.num_devices,
        priority=0 if probe is None else probe.priority,
        evidence=evidence,
        versions=versions,
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


def _size(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else human_bytes(num_bytes)
