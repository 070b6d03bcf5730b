"""The house stands as it is drawn."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = {
    "__init__.py",
    "__main__.py",
    "py.typed",
    "hw_matrix.yaml",
    "core",
    "backends",
    "plugins",
    "server",
    "docs",
}
VENDORS = re.compile(
    r"\b(cuda|rocm|hip|hpu|gaudi|habana|xla|tpu|neuron)\b|torch\.(cuda|xpu|hpu)", re.IGNORECASE
)
UNSAFE = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}


def sources(*folders):
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]


def test_the_source_links_are_exactly_the_parts_of_the_package():
    links = {p.name: p for p in (ROOT / "src/chipset").iterdir() if p.name != "__pycache__"}
    assert set(links) == LINKS
    for name, link in links.items():
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


def test_the_core_and_the_server_know_no_vendor():
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources("core", "server")
        for line in path.read_text().splitlines()
        if VENDORS.search(line)
    ]
    assert not found


def test_nothing_is_unpickled_anywhere():
    for path in sources("core", "server", "backends", "plugins"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not UNSAFE & {alias.name.split(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in UNSAFE, path
            elif isinstance(node, ast.Attribute):
                assert node.attr not in ("recv_pyobj", "send_pyobj"), path
                is_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
                assert not (is_torch and node.attr == "load"), path


def test_files_and_functions_stay_small():
    for path in sources("core", "server", "backends", "plugins"):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path}: {node.name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.network
def test_the_wheel_holds_every_module_once_and_runs_without_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("chipset-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".dist-info/" not in n]
        archive.extractall(tmp_path / "unpacked")
    assert len(names) == len(set(names))
    expected = {
        f"chipset/{p.relative_to(ROOT)}" for p in sources("core", "server", "backends", "plugins")
    }
    expected |= {"chipset/hw_matrix.yaml", "chipset/backends/hw_matrix.schema.json"}
    expected |= {f"chipset/{p.relative_to(ROOT)}" for p in (ROOT / "docs/evidence").iterdir()}
    assert expected <= set(names)
    assert {name.split("/")[0] for name in names} == {"chipset"}
    code = "import chipset; print(chipset.__file__); from chipset.server.cli import main; main(['version'])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "unpacked"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert str(tmp_path / "unpacked") in done.stdout, done.stderr
