"""What the kit finds out about plugins only where they are installed: by a distribution that a stranger wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import strangers

STRANGER = """
from dataclasses import replace
from chipset.backends.hookspecs import hookimpl
from chipset.plugins.cpu.plugin import CPUPlugin

class Stranger(CPUPlugin):
    info = replace(CPUPlugin.info, name="stranger", distribution={distribution!r})

    def resolve(self, options, model, capabilities):
        {resolve}
        return super().resolve(options, model, capabilities)

@hookimpl
def backend_plugin():
    return Stranger()
"""
SCRIPT = """
import json, sys
from pathlib import Path
from chipset.backends.conformance.run import run

suites = ["chipset.backends.conformance.plugin:PluginSuite"]
outcome = run(suites, "stranger", quick=True, directory=Path(sys.argv[1]), say=lambda line: None)
print(json.dumps(outcome.as_json()))
"""


def failures(folder: Path, *, distribution: str = "strangers", resolve: str = "pass") -> list[str]:
    """Cases that the stranger fails, less the suite's name."""
    text = STRANGER.format(distribution=distribution, resolve=resolve)
    installed = strangers.write(folder / "installed", {"stranger": text})
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["passed"] > 20
    return [
        case["name"].removeprefix("PluginSuite::")
        for case in outcome["cases"]
        if case["status"] != "passed"
    ]


def test_a_plugin_that_is_right_passes(tmp_path: Path) -> None:
    assert failures(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "caught_by"),
    [
        ({"resolve": "import torch"}, "test_its_parent_half_imports_no_sdk"),
        ({"distribution": "other"}, "test_it_is_named_as_its_entry_point_and_distribution"),
    ],
)
def test_a_plugin_that_is_wrong_is_caught(
    tmp_path: Path, change: dict[str, str], caught_by: str
) -> None:
    assert failures(tmp_path, **change) == [caught_by]
