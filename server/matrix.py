"""`chipset matrix`: what each backend does, on which evidence, and how old the proof is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..backends.entries import find_entries
from ..backends.errors import UnknownBackend
from ..backends.matrix import Evidence, Image, Level, Matrix, Row
from . import tables

State = Literal["fresh", "stale", "failed", "missing", "unknown"]
"""unknown: the plugin is not installed, so that its code cannot be compared with the report."""

Form = Literal["table", "json", "md"]
OVERVIEW = ("backend", "evidence", "date", "device", "report", "what")
DETAILS = ("claim", "value", "evidence")


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What stands behind the claims of a backend on one level."""

    level: Level
    state: State
    report: Evidence | None


def proofs(
    row: Row,
    plugins: Mapping[str, str],
    find: Callable[[str, Level], Evidence | None] = Evidence.find,
) -> Sequence[Proof]:
    """One for each level that the row claims something on. `plugins`: the modules of entry points, by name."""
    return [
        _proof(level, find(row.name, level), plugins.get(row.name))
        for level in row.levels
        if level != "none"
    ]


def installed_modules() -> Mapping[str, str]:
    """The modules that entry points name, by the backend's name; none of them is imported."""
    return {entry.name: entry.module for entry in find_entries()}


def render(name: str | None, form: Form, width: int | None = None) -> str:
    """All rows, or everything about one; a table is wrapped to `width`. Raises UnknownBackend."""
    rows = _chosen(Matrix.load(), name)
    plugins = installed_modules()
    if form == "json":
        document = {row.name: as_document(row, plugins) for row in rows}
        return json.dumps(document if name is None else document[name], indent=2)
    wanted: list[tuple[Sequence[str], tables.Rows]] = [(OVERVIEW, overview(rows, plugins))]
    if name is not None:
        wanted += [(DETAILS, details(row)) for row in rows]
    texts = [
        tables.markdown(head, lines) if form == "md" else tables.aligned(head, lines, width)
        for head, lines in wanted
    ]
    return "\n\n".join(texts)


def overview(rows: Sequence[Row], plugins: Mapping[str, str]) -> tables.Rows:
    """A line for each backend and level of evidence, under OVERVIEW."""
    return [line for row in rows for line in _overview(row, proofs(row, plugins))]


def details(row: Row) -> tables.Rows:
    """A line for each cell and level of evidence, under DETAILS."""
    return [
        (cell.replace("_", " "), claim_text(claim), level)
        for cell, claims in row.cells.items()
        for level, claim in (claims or {"none": ()}).items()
    ]


def claim_text(claim: object) -> str:
    """What one level stands behind, in words; "" for nothing."""
    if isinstance(claim, Image):
        licences = f"; licences {', '.join(claim.licences)}" if claim.licences else ""
        return f"{claim.file or 'no image'}; redistributable: {claim.redistributable}{licences}"
    if isinstance(claim, Mapping):
        return ", ".join(f"{name} {value}" for name, value in claim.items())
    assert isinstance(claim, tuple)
    return ", ".join(map(str, claim))


def as_document(row: Row, plugins: Mapping[str, str]) -> dict[str, Any]:
    """For JSON: the row, and its proofs."""
    return asdict(row) | {"proofs": [asdict(proof) for proof in proofs(row, plugins)]}


def _overview(row: Row, found: Sequence[Proof]) -> tables.Rows:
    if not found:
        return [(row.name, "none", "", "", "", row.summary)]
    return [
        (
            row.name,
            proof.level,
            proof.report.date[:10] if proof.report else "",
            proof.report.device if proof.report else "",
            proof.state,
            row.summary,
        )
        for proof in found
    ]


def _chosen(matrix: Matrix, name: str | None) -> Sequence[Row]:
    if name is None:
        return list(matrix.rows.values())
    if name not in matrix.rows:
        raise UnknownBackend(
            f"the matrix has no backend {name!r}; it has {', '.join(matrix.rows)}, and of others "
            "`chipset doctor` shows what is installed"
        )
    return [matrix.rows[name]]


def _proof(level: Level, report: Evidence | None, plugin: str | None) -> Proof:
    if report is None:
        return Proof(level=level, state="missing", report=None)
    if not report.green:
        return Proof(level=level, state="failed", report=report)
    try:
        stale = None if plugin is None else report.stale(plugin)
    except ModuleNotFoundError:
        stale = None
    state: State = "unknown" if stale is None else "stale" if stale else "fresh"
    return Proof(level=level, state=state, report=report)
