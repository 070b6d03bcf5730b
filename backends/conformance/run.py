"""Suites of the kit against an installed backend, by pytest in this process."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import ChipsetError
from ..registry import Registry

if TYPE_CHECKING:
    import pytest

Status = Literal["passed", "failed", "skipped"]
PRIVATE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "PYTEST_PLUGINS": ""}
"""Variables of pytest's while it runs: the plugins and habits of whoever calls are not the kit's."""
MODULE = "test_conformance"


class KitUnavailable(ChipsetError):
    """The kit cannot run in this installation."""

    exit_code: ClassVar[int] = 11


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One test of one suite."""

    name: str
    """"SamplerSuite::test_a_draw_is_the_same[8]"."""
    status: Status
    reason: str
    """Why it was skipped, or what failed, in one line; "" where it passed."""
    seconds: float
    """Set-up and tear-down too."""
    figures: str = ""
    """What it recorded as the property "figures"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of all cases."""

    cases: tuple[Case, ...]
    seconds: float

    @property
    def passed(self) -> int:
        """Cases that passed."""
        return self._count("passed")

    @property
    def failed(self) -> int:
        """Cases that failed, and errors outside of cases."""
        return self._count("failed")

    @property
    def skipped(self) -> int:
        """Cases that do not apply to this backend."""
        return self._count("skipped")

    @property
    def summary(self) -> str:
        """One line: "N passed, N failed, N skipped"."""
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"

    @property
    def skip_reasons(self) -> Mapping[str, int]:
        """How many cases were skipped for each reason, the most frequent first."""
        skipped = Counter(case.reason for case in self.cases if case.status == "skipped")
        return dict(skipped.most_common())

    def as_json(self) -> dict[str, Any]:
        """Of plain values only."""
        return {
            "passed": self.passed,
            "failed": self.failed,
            "skipped": self.skipped,
            "seconds": round(self.seconds, 3),
            "cases": [asdict(case) | {"seconds": round(case.seconds, 3)} for case in self.cases],
        }

    def _count(self, status: Status) -> int:
        return sum(case.status == status for case in self.cases)


def run(
    suites: Sequence[str],
    backend: str,
    *,
    quick: bool,
    directory: Path,
    say: Callable[[str], None] | None = None,
    find: Callable[[str], object] = find_spec,
) -> Outcome:
    """Run `suites` ("package.module:Class") against the installed plugin `backend`.

    What a stranger would write, a module that subclasses each suite, is written into `directory` and run there; no
    configuration of the current folder is read. `say` (standard output) is told each case, skips by their reason, and
    last the summary. Raises UnknownBackend, BackendUnavailable or KitUnavailable before any case runs.
    """
    say = say or _say
    if find("pytest") is None:
        raise KitUnavailable(
            "the conformance kit runs by pytest, which is missing; install the extra conformance, "
            f"or `{sys.executable} -m pip install pytest`"
        )
    Registry.discover().select(backend)
    began = time.monotonic()
    recorder = _Recorder(say, [suite.partition(":")[0] for suite in suites])
    _run_pytest(_write_module(suites, backend, quick=quick, directory=directory), recorder)
    outcome = Outcome(cases=tuple(recorder.cases), seconds=time.monotonic() - began)
    if not outcome.cases:
        raise KitUnavailable(f"no case was found in {', '.join(suites)}; name suites of the kit")
    for reason, count in outcome.skip_reasons.items():
        say(f"{count} skipped: {reason}")
    say(outcome.summary)
    return outcome


def _write_module(suites: Sequence[str], backend: str, *, quick: bool, directory: Path) -> Path:
    imports, classes = [], []
    for suite in suites:
        module, _, name = suite.partition(":")
        imports.append(f"from {module} import {name}\n")
        classes.append(
            f"\n\nclass Test{name}({name}):\n    backend = {backend!r}\n    is_quick = {quick}\n"
        )
    path = directory / f"{MODULE}.py"
    path.write_text("".join(imports + classes))
    (directory / "pytest.ini").write_text("[pytest]\n")
    return path


def _run_pytest(module: Path, recorder: _Recorder) -> None:
    import pytest  # an extra: `run` says so where it is missing

    folder = module.parent
    arguments = (
        *("-c", str(folder / "pytest.ini"), "--rootdir", str(folder), "--confcutdir", str(folder)),
        *("--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:terminal"),
        *("-p", "no:warnings", str(module)),
    )
    with _environment(PRIVATE):
        pytest.main([*arguments], plugins=[recorder])
    # in this mode pytest would find it there again when another backend is asked for
    sys.modules.pop(MODULE, None)
    if recorder.is_interrupted:
        raise KeyboardInterrupt


class _Recorder:
    """A plugin of pytest that keeps and tells what becomes of each case."""

    def __init__(self, say: Callable[[str], None], modules: Sequence[str]) -> None:
        self.cases: list[Case] = []
        self.is_interrupted = False
        self._say = say
        self._modules = modules
        self._phases: list[pytest.TestReport] = []

    def pytest_configure(self) -> None:
        """Suites, and what is in their packages, show the values of what they assert."""
        import pytest

        pytest.register_assert_rewrite(*self._modules)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(Case(name=_name(report), status="failed", reason=_reason(report), seconds=0))
            self._say(report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._phases.append(report)
        if report.when != "teardown":
            return
        phases, self._phases = self._phases, []
        failed = [phase for phase in phases if phase.failed]
        skipped = [phase for phase in phases if phase.skipped]
        status: Status = "failed" if failed else "skipped" if skipped else "passed"
        told = (failed or skipped or [report])[0]
        self._add(
            Case(
                name=_name(report),
                status=status,
                reason="" if status == "passed" else _reason(told),
                seconds=sum(phase.duration for phase in phases),
                figures=str(dict(report.user_properties).get("figures", "")),
            )
        )
        for phase in failed:
            self._say(phase.longreprtext)

    def pytest_internalerror(self, excrepr: Any) -> None:
        reason = str(excrepr).strip().rpartition("\n")[2]
        self._add(Case(name="pytest", status="failed", reason=reason, seconds=0))
        self._say(str(excrepr))

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        # also called when cases could not be collected, by a subclass
        self.is_interrupted = excinfo.type is KeyboardInterrupt

    def _add(self, case: Case) -> None:
        self.cases.append(case)
        if case.status != "skipped":
            figures = f": {case.figures}" if case.figures else ""
            self._say(f"{case.status} {case.seconds:7.2f} s  {case.name}{figures}")


def _name(report: pytest.TestReport | pytest.CollectReport) -> str:
    return report.nodeid.removeprefix(f"{MODULE}.py::").removeprefix("Test")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """One line of what pytest tells."""
    told = report.longrepr
    if isinstance(told, tuple):  # a skip: path, line, reason
        return str(told[2]).removeprefix("Skipped: ")
    crash = getattr(told, "reprcrash", None)
    text = crash.message if crash is not None else str(told)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if crash is not None and lines else lines[-1] if lines else "no reason given"


def _say(line: str) -> None:
    # at once: what is left in the buffer would end up in what pytest captures of the next case
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
