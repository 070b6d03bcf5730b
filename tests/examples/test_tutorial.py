"""docs/plugins.md says what is so: its code runs, and what it names is there."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tutorial

from chipset.backends import hookspecs
from chipset.backends.backend import MEMBERS
from chipset.backends.plugin import Plugin

PAGE = tutorial.PAGE.read_text()
STEPS = tutorial.steps()
WRITTEN = [step for step in STEPS if step.does == "write"]
KIT = """
import json, sys
from pathlib import Path
from chipset.backends.conformance.run import run

suites = ["plugin:PluginSuite", "shapes:ShapesSuite", "ops:OpsSuite"]
suites = [f"chipset.backends.conformance.{suite}" for suite in suites]
outcome = run(suites, "pebble", quick=True, directory=Path(sys.argv[1]), say=lambda line: None)
print(json.dumps(outcome.as_json()))
"""


def test_the_page_is_a_tutorial() -> None:
    commands = "\n".join(step.text for step in STEPS if step.does == "run")
    for wanted in ("pip install -e .", "chipset conformance --backend pebble", "pytest -q tests"):
        assert wanted in commands
    assert {step.path for step in WRITTEN} == {
        "pyproject.toml",
        "src/chipset_pebble/__init__.py",
        "src/chipset_pebble/plugin.py",
        "src/chipset_pebble/backend.py",
        "src/chipset_pebble/shapes.py",
        "tests/test_contract.py",
    }


def test_its_plugins_import_the_contract_alone() -> None:
    for step in STEPS:
        if step.does not in ("write", "stand alone") or step.path.endswith(".toml"):
            continue
        for node in ast.walk(ast.parse(step.text)):
            if isinstance(node, ast.ImportFrom) and not node.level:
                parts = (node.module or "").split(".")
                if parts[0] == "chipset" and not step.path.startswith("tests/"):
                    assert parts[1] == "backends", f"{step.path} imports {node.module}"


def test_code_that_stands_alone_runs() -> None:
    alone = [step for step in STEPS if step.does == "stand alone"]
    assert alone
    for step in alone:
        subprocess.run([sys.executable, "-P", "-c", step.text], check=True)


@pytest.mark.parametrize("num_files", [3, len(WRITTEN)], ids=["first", "last"])
def test_what_is_written_keeps_the_contract(num_files: int, tmp_path: Path) -> None:
    """As if it were installed; the whole kit is run on it by scripts/test-strangers."""
    for step in WRITTEN[:num_files]:
        tutorial.write(step, tmp_path)
    site = tmp_path / "src"
    info = site / "chipset_pebble-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: chipset-pebble\nVersion: 0.1.0\n")
    project = (tmp_path / "pyproject.toml").read_text()
    (entry,) = re.findall(r'^pebble = "(.+)"$', project, re.MULTILINE)
    (info / "entry_points.txt").write_text(f"[chipset.backends]\npebble = {entry}\n")
    done = subprocess.run(
        [sys.executable, "-P", "-c", KIT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    failed = [case["name"] for case in outcome["cases"] if case["status"] == "failed"]
    assert not failed
    assert outcome["passed"] > 80


def test_every_member_and_hook_is_named() -> None:
    members = [name for name in vars(Plugin) if not name.startswith("_")]
    for name in [*members, "info"]:
        assert f"`Plugin.{name}`" in PAGE
    for name, _ in (*MEMBERS, ("prepare", None), ("close", None)):
        assert f"`Backend.{name}`" in PAGE
    hooks = [name for name, value in vars(hookspecs).items() if hasattr(value, "chipset_spec")]
    assert hooks
    for name in hooks:
        assert f"| `{name}` |" in PAGE


def test_what_members_start_from_is_there() -> None:
    tables = PAGE[PAGE.index("## Reference: members") : PAGE.index("## Reference: a weight")]
    named = re.findall(r"`([a-z_]+)\.(\w+)`", tables)
    assert len(named) > 15
    for module, name in named:
        assert hasattr(importlib.import_module(f"chipset.backends.reference.{module}"), name)


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#([\w-]+))?\)", PAGE)
    assert links
    for target, anchor in links:
        path = (tutorial.PAGE.parent / target).resolve()
        assert path.exists(), target
        if anchor:
            assert re.search(rf"^#+ {anchor}$", path.read_text(), re.MULTILINE), anchor
