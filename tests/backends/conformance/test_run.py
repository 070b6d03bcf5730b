"""The kit's runner, on suites made for it: what it counts, what it tells, and what it does not read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chipset.backends.conformance.run import Case, KitUnavailable, Outcome, run
from chipset.backends.errors import UnknownBackend

SUITES = """
import os
import pytest
from chipset.backends.conformance.suite import Suite

class MixedSuite(Suite):
    @pytest.fixture
    def broken(self):
        raise RuntimeError("no device")

    @pytest.fixture
    def leaking(self):
        yield
        raise RuntimeError("not given back")

    def test_passes(self, plugin):
        assert plugin.info.name == self.backend

    def test_fails(self):
        found = 3
        assert found == 4, "three is not four"

    @pytest.mark.parametrize("size", [1, 2])
    def test_is_not_claimed(self, size):
        self.require(size > 2, "no such size")

    def test_is_thorough(self):
        self.thorough()

    def test_needs_what_is_broken(self, broken):
        pass

    def test_leaks(self, leaking):
        pass

class EmptySuite(Suite):
    pass

class EnvironmentSuite(Suite):
    def test_sees_nothing_of_the_folder(self, request):
        assert os.path.exists(os.path.join(os.getcwd(), "conftest.py"))
        assert request.config.getini("addopts") == []
        assert not request.config.pluginmanager.hasplugin("cacheprovider")
        print("swallowed")
"""
Run = Callable[..., Outcome]


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def run_suites(tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    folder = tmp_path / "on_path"
    folder.mkdir()
    (folder / "kit_suites.py").write_text(SUITES)
    (folder / "kit_broken.py").write_text("raise ImportError('no such library')\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "kit_suites", raising=False)

    def call(*suites: str, backend: str = "cpu", quick: bool = False) -> Outcome:
        return run(suites, backend, quick=quick, directory=tmp_path, say=lines.append)

    return call


def test_counts_cases_and_tells_each_with_the_summary_last(
    run_suites: Run, lines: list[str]
) -> None:
    outcome = run_suites("kit_suites:MixedSuite")

    assert (outcome.passed, outcome.failed, outcome.skipped) == (2, 3, 2)
    assert lines[-1] == outcome.summary == "2 passed, 3 failed, 2 skipped"
    assert lines[-2] == "2 skipped: no such size"
    told = [line.rpartition("::")[2] for line in lines if line.startswith(("passed", "failed"))]
    assert told == [
        "test_passes",
        "test_fails",
        "test_is_thorough",
        "test_needs_what_is_broken",
        "test_leaks",
    ]


def test_a_case_says_why_it_failed_or_was_skipped(run_suites: Run, lines: list[str]) -> None:
    cases = {
        case.name.rpartition("::")[2]: case for case in run_suites("kit_suites:MixedSuite").cases
    }

    assert cases["test_passes"].reason == ""
    assert "three is not four" in cases["test_fails"].reason
    assert cases["test_needs_what_is_broken"].reason == "RuntimeError: no device"
    assert cases["test_leaks"].reason == "RuntimeError: not given back"
    assert cases["test_is_not_claimed[1]"].status == "skipped"
    assert cases["test_is_not_claimed[1]"].reason == "no such size"
    assert all(
        case.name.startswith("MixedSuite::") for case in run_suites("kit_suites:MixedSuite").cases
    )
    assert any("found = 3" in line for line in lines), "the traceback of a failure is told"


def test_the_quick_selection_leaves_thorough_cases_out(run_suites: Run) -> None:
    outcome = run_suites("kit_suites:MixedSuite", quick=True)

    assert outcome.skip_reasons == {"no such size": 2, "left out of the quick selection": 1}


def test_the_outcome_is_json(run_suites: Run) -> None:
    outcome = run_suites("kit_suites:MixedSuite")

    read = json.loads(json.dumps(outcome.as_json()))

    assert (read["passed"], read["failed"], read["skipped"]) == (2, 3, 2)
    assert Case(**read["cases"][0]).name == outcome.cases[0].name


def test_a_suite_that_cannot_be_imported_is_a_failure(run_suites: Run, lines: list[str]) -> None:
    outcome = run_suites("kit_broken:NoSuite")

    assert (outcome.passed, outcome.failed, outcome.skipped) == (0, 1, 0)
    assert "no such library" in outcome.cases[0].reason
    assert lines[-1] == "0 passed, 1 failed, 0 skipped"


def test_each_run_is_of_the_backend_it_names(run_suites: Run) -> None:
    other = run_suites("kit_suites:MixedSuite", backend="sim-gpu").cases[0]
    cpu = run_suites("kit_suites:MixedSuite").cases[0]

    assert (other.status, cpu.status) == ("passed", "passed")


def test_a_backend_that_is_not_installed_is_named_before_any_case(
    run_suites: Run, lines: list[str]
) -> None:
    with pytest.raises(UnknownBackend, match="installed: cpu"):
        run_suites("kit_suites:MixedSuite", backend="abacus")

    assert lines == []


def test_without_pytest_the_cure_is_said(tmp_path: Path) -> None:
    with pytest.raises(KitUnavailable, match=r"extra conformance, or `.* -m pip install pytest`"):
        run((), "cpu", quick=True, directory=tmp_path, find=lambda name: None)


def test_suites_without_cases_prove_nothing(run_suites: Run) -> None:
    with pytest.raises(KitUnavailable, match="no case was found in kit_suites:EmptySuite"):
        run_suites("kit_suites:EmptySuite")


def test_reads_no_configuration_of_the_folder_and_tells_no_output_of_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "kit_suites.py").write_text(SUITES)
    (folder / "conftest.py").write_text("raise RuntimeError('read')\n")
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--nor-this-one")
    monkeypatch.setenv("PYTEST_PLUGINS", "no_such_plugin")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    made = folder / "made"
    made.mkdir()
    script = (
        "from pathlib import Path\n"
        "from chipset.backends.conformance.run import run\n"
        f"run(['kit_suites:EnvironmentSuite'], 'cpu', quick=True, directory=Path({str(made)!r}))\n"
    )

    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=folder, capture_output=True, text=True
    )

    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "1 passed, 0 failed, 0 skipped"
    assert "swallowed" not in done.stdout
