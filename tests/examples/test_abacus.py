"""The example of a plugin is what it says; scripts/test-strangers installs it and runs the whole kit."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from code_lines import code_lines, count_code

from . import abacus

MOST_LINES = 150
STDLIB_AND_TORCH = {*sys.stdlib_module_names, "torch"}
TESTED_WITH = {*STDLIB_AND_TORCH, "pytest", "safetensors", "chipset_abacus"}


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, but for those of its own package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def is_within(module: str, *packages: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def test_it_is_short() -> None:
    counted = count_code(abacus.ROOT / "src")
    assert len(counted) > 3
    assert sum(counted.values()) <= MOST_LINES, counted


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("", 0),
        ("# no code\n\nx = 1  # code\n", 1),
        (
            '"""Doc."""\n\n\ndef f():\n    """Doc.\n\n    More.\n    """\n    return (\n        1\n    )\n',
            4,
        ),
        ('x = """a\n\nb"""\n', 3),
    ],
)
def test_lines_of_code_are_counted_without_prose(source: str, lines: int) -> None:
    assert code_lines(source) == lines


def test_it_imports_the_contract_alone() -> None:
    for path in (abacus.ROOT / "src").rglob("*.py"):
        for module in imported(path):
            assert is_within(module, "chipset.backends", *STDLIB_AND_TORCH), f"{path}: {module}"


def test_its_tests_import_the_contract_and_the_kit_alone() -> None:
    allowed = ("chipset.backends", "chipset.core.conformance", *TESTED_WITH)
    paths = list((abacus.ROOT / "tests").rglob("*.py"))
    assert paths
    for path in paths:
        for module in imported(path):
            assert is_within(module, *allowed), f"{path}: {module}"


def test_it_patches_nothing() -> None:
    """No attribute of anything but itself or a part of its own is set, and no setattr."""
    for path in (abacus.ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AnnAssign | ast.AugAssign):
                targets = [node.target]
            for target in (t for several in targets for t in ast.walk(several)):
                if isinstance(target, ast.Attribute):
                    owner = target.value
                    assert isinstance(owner, ast.Name), ast.unparse(node)
                    assert owner.id == "self", ast.unparse(node)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("setattr", "exec", "eval"), ast.unparse(node)


def test_it_depends_on_chipset_alone() -> None:
    assert 'dependencies = ["chipset"]' in (abacus.ROOT / "pyproject.toml").read_text()


def test_its_own_tests_pass(tmp_path: Path) -> None:
    """But for the kit."""
    configuration = abacus.ROOT / "pyproject.toml"
    arguments = ("-q", "-p", "no:cacheprovider", "-c", configuration, "--rootdir", abacus.ROOT)
    tests = [
        abacus.ROOT / "tests" / name for name in ("test_beads.py", "test_sum.py", "test_engine.py")
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *arguments, *tests],
        env={**os.environ, "PYTHONPATH": str(abacus.installed(tmp_path))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
