"""Both halves of the kit against an installed backend, and the report that may stand behind a claim of the matrix."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from ... import __version__
from ...backends.conformance.run import Outcome, run
from ...backends.entries import find_entries
from ...backends.matrix import MATRIX, Counts, Evidence, Level, report_path, source_hash
from ...backends.registry import Registry, Selection

SUITES = (
    "chipset.backends.conformance:BackendConformance",
    "chipset.core.conformance:EngineConformance",
)


def check_backend(name: str, *, quick: bool) -> Outcome:
    """Run the kit and tell each case on standard output.

    Raises UnknownBackend, BackendUnavailable, or KitUnavailable where pytest is missing.
    """
    with tempfile.TemporaryDirectory(prefix="chipset-conformance-") as folder:
        return run(SUITES, name, quick=quick, directory=Path(folder))


def write_report(outcome: Outcome, name: str, command: str, path: Path) -> Path:
    """The report of an outcome as JSON; a folder gets BACKEND-LEVEL.json. Where it was written."""
    evidence = make_evidence(outcome, Registry.discover().select(name), command)
    if path.is_dir():
        path = report_path(name, evidence.level, path)
    evidence.write(path)
    return path


def make_evidence(outcome: Outcome, selection: Selection, command: str) -> Evidence:
    """What was seen, where, and of which code."""
    name, probe = selection.plugin.info.name, selection.probe
    module = next(entry.module for entry in find_entries() if entry.name == name)
    level: Level = "simulated" if probe.simulated else "hardware"
    what = probe.architecture or selection.plugin.capabilities(probe).device_type
    return Evidence(
        backend=name,
        level=level,
        commit=_commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=f"{what} ({platform.machine()}, {os.cpu_count()} cores)",
        command=command,
        counts=Counts(passed=outcome.passed, failed=outcome.failed, skipped=outcome.skipped),
        sources=source_hash(module),
        chipset=__version__,
        torch=version("torch"),
        figures={case.name: case.figures for case in outcome.cases if case.figures},
        skipped=dict(outcome.skip_reasons),
    )


def _commit() -> str:
    """Of the checkout that this package lies in; an installed one is known by its version."""
    # in a checkout this file is a link from src/ to the root
    root = MATRIX.resolve().parent
    if not (root / "pyproject.toml").is_file() or shutil.which("git") is None:
        return f"v{__version__}"
    git = ("git", "-C", str(root))
    head = subprocess.run((*git, "rev-parse", "HEAD"), capture_output=True, text=True)
    if head.returncode != 0:
        return f"v{__version__}"
    # reports that were just written are no code
    code = (".", ":(exclude)docs/evidence")
    changed = subprocess.run((*git, "diff", "--quiet", "HEAD", "--", *code), capture_output=True)
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")
