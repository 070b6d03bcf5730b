"""hw_matrix.yaml: what each backend does, on which evidence, and whether the proof is as old as the code.

A claim stands under its level of evidence. A proof is a committed report, BACKEND-LEVEL.json in docs/evidence, that
holds a hash of the code that it was made with. The file that is packaged is trusted; the tests hold it to its schema.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal

import yaml

Level = Literal["hardware", "emulated", "compiled", "simulated", "api-checked", "none"]
LEVELS: Mapping[Level, str] = {
    "hardware": "ran on the chip",
    "emulated": "the vendor's own software ran on a CPU",
    "compiled": "lowered for the target, not run",
    "simulated": "ran on our own stand-in: proves the engine and the contract, never a vendor's kernels",
    "api-checked": "signatures compared with the vendor's source",
    "none": "not seen",
}
"""What each level means, strongest first."""

PACKAGE = Path(__file__).parent.parent
MATRIX = PACKAGE / "hw_matrix.yaml"
REPORTS = PACKAGE / "docs" / "evidence"
SOURCES = frozenset((".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hip", ".hpp"))
"""What counts as code in `source_hash`."""

Cell = Mapping[Level, tuple[str, ...]]
"""What is claimed on which evidence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The versions of a package from one on, and below another."""

    start: str
    below: str

    def holds(self, version: str) -> bool:
        """Is it in, by its `release`?"""
        return release(self.start) <= release(version) < release(self.below)

    def __str__(self) -> str:
        return f">={self.start},<{self.below}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A container image, and whether others may have it."""

    file: str | None
    licences: tuple[str, ...]
    redistributable: Literal["yes", "no", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One backend."""

    name: str
    summary: str
    simulated: bool
    """It proves the engine and the contract only."""
    devices: Cell
    dtypes: Cell
    kv_dtypes: Cell
    attention_kernels: Cell
    attention: Cell
    """causal, and the names of Capabilities.attention."""
    block_sizes: Mapping[Level, tuple[int, ...]]
    """Tokens, preferred first."""
    quantization: Mapping[Level, Mapping[str, str]]
    """A checkpoint's format: native, dequantised (at load) or refused."""
    collectives: Cell
    graphs: Cell
    shapes: Cell
    parallelism: Cell
    versions: Mapping[Level, Mapping[str, Window]]
    """python, torch, and the SDK's distributions by their names: those that were seen."""
    image: Mapping[Level, Image]

    @property
    def cells(self) -> Mapping[str, Mapping[Level, Any]]:
        """All claims, by the name of the cell."""
        texts = ("name", "summary", "simulated")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in texts}

    @property
    def levels(self) -> tuple[Level, ...]:
        """Those that something is claimed on, strongest first; ("none",) where nothing is."""
        used = {level for cell in self.cells.values() for level, claim in cell.items() if claim}
        return tuple(level for level in LEVELS if level in used and level != "none") or ("none",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """The whole file."""

    rows: Mapping[str, Row]
    """By the name of the backend, in the file's order."""
    compilers: tuple[str, ...]
    """Programs that backends are built with."""

    @classmethod
    def load(cls, path: Path = MATRIX) -> Matrix:
        """The packaged matrix, which is not validated here (see hw_matrix.schema.json)."""
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows = {name: _row(name, row) for name, row in document["backends"].items()}
        return cls(rows=rows, compilers=tuple(document["compilers"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """How the tests of a report ended."""

    passed: int
    failed: int
    skipped: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """A report: what stands behind the claims of one backend on one level."""

    backend: str
    level: Level
    commit: str
    """Of the code, or v and the version where it was no checkout."""
    date: str
    """ISO 8601."""
    device: str
    command: str
    """That wrote it."""
    counts: Counts
    sources: str
    """source_hash of the plugin's module."""
    chipset: str
    """Version."""
    torch: str
    """Version."""
    figures: Mapping[str, str] = field(default_factory=dict)
    """What cases measured, by their names."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """How many cases were skipped for each reason."""

    @classmethod
    def read(cls, path: Path) -> Evidence:
        """A report that `write` wrote."""
        document = json.loads(path.read_text(encoding="utf-8"))
        return cls(**document | {"counts": Counts(**document["counts"])})

    @classmethod
    def find(cls, backend: str, level: Level, folder: Path = REPORTS) -> Evidence | None:
        """The packaged report; None where there is none."""
        path = report_path(backend, level, folder)
        return cls.read(path) if path.is_file() else None

    def write(self, path: Path) -> None:
        """As JSON, with its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @property
    def green(self) -> bool:
        """Did tests run, and did all of them pass?"""
        return self.counts.passed > 0 and self.counts.failed == 0

    def stale(self, plugin: str) -> bool:
        """Is the code another one now? `plugin`: the module that its entry point names."""
        return self.sources != source_hash(plugin)


def report_path(backend: str, level: Level, folder: Path = REPORTS) -> Path:
    """Where the report of a backend on a level lies."""
    return folder / f"{backend}-{level}.json"


def source_hash(plugin: str) -> str:
    """sha256, as hex digits, over the code in backends/ and in the folder of a plugin's module.

    A module outside of any package counts alone. Imports nothing. Raises ModuleNotFoundError.
    """
    digest = hashlib.sha256()
    for root in (Path(__file__).parent, _root(plugin)):
        files = [root] if root.is_file() else [p for p in root.rglob("*") if p.suffix in SOURCES]
        for path in sorted(files):
            name = path.relative_to(root.parent).as_posix()
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare by: 2.13.0+cpu is (2, 13, 0), 2.14.0rc1 is (2, 14, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _root(plugin: str) -> Path:
    """Found part by part: importlib.util.find_spec would import the packages around the module."""
    parts = plugin.split(".")
    folders: Sequence[str] | None = None
    origin: str | None = None
    for end in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:end]), folders)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"No module named {plugin!r}", name=plugin)
        folders, origin = spec.submodule_search_locations, spec.origin
    assert origin is not None
    alone = folders is None and len(parts) == 1
    return Path(origin) if alone else Path(origin).parent


def _row(name: str, row: Mapping[str, Any]) -> Row:
    texts = ("devices", "dtypes", "kv_dtypes", "attention_kernels", "attention", "block_sizes")
    more = ("collectives", "graphs", "shapes", "parallelism")
    cells: dict[str, Any] = {
        cell: {level: tuple(values) for level, values in row[cell].items()}
        for cell in (*texts, *more)
    }
    versions = {
        level: {p: Window(start=w["from"], below=w["below"]) for p, w in windows.items()}
        for level, windows in row["versions"].items()
    }
    image = {
        level: Image(
            file=one.get("file"),
            licences=tuple(one["licences"]),
            redistributable=one["redistributable"],
        )
        for level, one in row["image"].items()
    }
    return Row(
        name=name,
        summary=row["summary"],
        simulated=row["simulated"],
        quantization=row["quantization"],
        versions=versions,
        image=image,
        **cells,
    )
