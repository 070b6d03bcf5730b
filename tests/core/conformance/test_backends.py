"""The quick selection of the kit against every backend that runs here, by the command that anyone would give."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from chipset.backends.matrix import Evidence, report_path

LEVELS = {
    "cpu": "hardware",
    "sim-gpu": "simulated",
    "sim-gaudi": "simulated",
    "sim-neuron": "simulated",
    "sim-tpu": "simulated",
}


@pytest.mark.parametrize("backend", LEVELS)
def test_a_backend_keeps_the_contract(backend: str, tmp_path: Path) -> None:
    command = ("conformance", "--backend", backend, "--quick", "--report", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "chipset", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"\d+ passed, 0 failed, \d+ skipped", last)
    report = Evidence.read(report_path(backend, LEVELS[backend], tmp_path))
    assert report.green
    assert report.counts.passed > 200
    assert f"{report.counts.passed} passed" in last


def test_without_pytest_the_command_says_the_cure(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "import importlib.util as util; found = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'pytest' else found(name, *rest)\n"
        "from chipset.server.cli import main\n"
        "main(['conformance', '--backend', 'cpu'])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 11
    assert "extra conformance" in done.stderr


def test_without_a_compiler_the_command_says_the_cure(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "chipset", "conformance", "--backend", "sim-gpu"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path), "CHIPSET_CACHE": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 11
    assert "apt-get install g++" in done.stderr
