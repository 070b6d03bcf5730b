"""Runs the kit against every broken plugin and against the whole ones, in one session of pytest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from chipset.backends.conformance.collectives import Worlds
from chipset.backends.conformance.suite import Suite
from chipset.backends.plugin import Plugin

from .areas import MUTATIONS
from .mutation import Mutation
from .reference_plugin import DynamicPlugin, ReferencePlugin

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
WHOLE: Mapping[str, Callable[[], Plugin]] = {"buckets": ReferencePlugin, "dynamic": DynamicPlugin}
"""Plugins that make no mistake."""
MUTANT = "TestMutant"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """What became of each plugin."""

    caught_by: Mapping[Mutation, str | None]
    """The first test, by name, that failed; None where none did."""
    failures: Sequence[str]
    """Of whole plugins: which test, and what it said."""
    num_passed: int
    """By whole plugins."""


def suite_for(
    suites: tuple[type[Suite], ...],
    plugin: Callable[[], Plugin],
    importable: str,
    worlds: Callable[[], Worlds] = dict,
) -> type[Suite]:
    """What a stranger would write to test `plugin`; `worlds` are those that have run already."""

    def make_plugin(self: Suite) -> Plugin:
        return plugin()

    body = {
        "is_quick": True,
        "make_plugin": make_plugin,
        "importable": importable,
        "folders": (str(ROOT),),
        "worlds": pytest.fixture(scope="class")(classmethod(lambda cls: worlds())),
    }
    return type("TestSuite", suites, body)


def run() -> Outcomes:
    """The quick selection. Of a broken plugin no more tests are run once one has failed."""
    recorder = _Recorder()
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "pytest.ini")
        empty.write_text("[pytest]\n")
        # thousands of tests, each of which would pay for these
        without = ("terminal", "cacheprovider", "timeout", "logging", "capture", "faulthandler")
        quiet = [*(f"-pno:{name}" for name in without), "--noconftest"]
        places = ["-c", str(empty), f"--rootdir={ROOT}", "--import-mode=importlib"]
        mutants = str(HERE / "mutants.py")
        ended = pytest.main([*quiet, *places, "-W", "error", mutants], [recorder])
    assert ended in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), recorder.failures or ended
    found = {number: recorder.failed.get(f"{MUTANT}{number}") for number in range(len(MUTATIONS))}
    return Outcomes(
        caught_by={mutation: found[number] for number, mutation in enumerate(MUTATIONS)},
        failures=recorder.failures,
        num_passed=recorder.num_passed,
    )


class _Recorder:
    """A plugin of pytest that orders tests by name, and remembers the first failure of each class."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.failures: list[str] = []
        self.num_passed = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        order = {name: number for number, name in enumerate(dict.fromkeys(map(_owner, items)))}
        items.sort(key=lambda item: (order[_owner(item)], item.name))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}: {report.longreprtext}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if _owner(item) in self.failed:
            pytest.skip("caught already")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        *_, owner, name = report.nodeid.split("::", 2)
        if owner.startswith(MUTANT):
            if report.failed:
                self.failed.setdefault(owner, name)
        elif report.failed:
            self.failures.append(f"{owner}.{name} ({report.when}): {report.longreprtext}")
        elif report.when == "call" and report.passed:
            self.num_passed += 1


def _owner(item: pytest.Item) -> str:
    return item.nodeid.split("::", 2)[1]
