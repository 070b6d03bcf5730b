"""The contract's surface: kept, documented, frozen, and open to members that older plugins do not know."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from contract_figures import code_lines, num_parameters
from contract_page import page
from contract_surface import BACKENDS, MODULES, WORKER_HALF, members, snapshot

from chipset.backends.backend import MEMBERS, Backend, check_members
from chipset.backends.errors import ChipsetError, PluginError
from chipset.plugins.cpu.backend import CPUBackend

ROOT = Path(__file__).parents[2]
SURFACE = Path(__file__).parent / "contract_surface.txt"
HELPERS = {"ChipsetError", "Pending"}


def contract_classes() -> list[type]:
    modules = [importlib.import_module(f"chipset.backends.{name}") for name in MODULES]
    return [
        found
        for module in modules
        for found in vars(module).values()
        if inspect.isclass(found) and found.__module__ == module.__name__
    ]


def test_the_surface_is_the_one_of_its_version() -> None:
    assert SURFACE.read_text() == snapshot(), (
        "the contract's surface changed: raise the minor of API_VERSION unless 0.9 was never "
        "released with the old one, say why in the commit, and run scripts/docs"
    )


def test_the_page_is_made_of_the_docstrings() -> None:
    assert (ROOT / "docs/contract.md").read_text() == page(), "run scripts/docs"


def test_every_member_is_documented() -> None:
    inherited = {f"{f.__name__}.exit_code" for f in contract_classes() if f is not ChipsetError}
    silent = {m.path.split(".", 1)[1] for m in members() if not m.doc} - inherited
    assert not silent


def test_value_types_are_frozen_and_take_names_only() -> None:
    values = [found for found in contract_classes() if dataclasses.is_dataclass(found)]
    assert len(values) > 20
    for value in values:
        parameters = value.__dataclass_params__
        assert parameters.frozen, value
        assert all(field.kw_only for field in dataclasses.fields(value)), value


def test_interfaces_are_abstract_classes_and_no_protocols() -> None:
    interfaces = [base for _, base in MEMBERS if base.__name__ != "Telemetry"]
    for interface in [*interfaces, Backend]:
        assert inspect.isabstract(interface), interface
        assert not getattr(interface, "_is_protocol", False), interface
    assert {base.__module__.rsplit(".", 1)[1] for _, base in MEMBERS} | {"backend"} == {
        *WORKER_HALF
    }


def test_a_backend_without_a_member_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CPUBackend.__new__(CPUBackend)
    with pytest.raises(PluginError, match=r"CPUBackend.runtime is missing.*Runtime"):
        check_members(backend)


def test_the_contract_stays_small() -> None:
    assert sum(map(code_lines, MODULES)) < 1000
    assert max(num_parameters(m.signature) for m in members() if m.kind == "method") <= 8


NEWER = {
    "capabilities.py": (
        '    device_type: str\n    """Torch device',
        '    can_fly: bool = False\n    """May it fly?"""\n    device_type: str\n    """Torch device',
    ),
    "runtime.py": (
        "    @abstractmethod\n    def synchronize(self)",
        """    def health(self) -> str:
        '''How it is.'''
        return "well"

    @abstractmethod
    def synchronize(self)""",
    ),
    "step.py": (
        "    token_slot: I32 | None = None\n",
        "    adapters: I32 | None = None\n    token_slot: I32 | None = None\n",
    ),
    "plugin.py": (
        "    @abstractmethod\n    def shapes(",
        """    def check_model(self, model: ModelSpec) -> str | None:
        '''Why not.'''
        return None

    @abstractmethod
    def shapes(""",
    ),
}
"""One optional field or member for each of four types."""
PROGRAM = """
import sys, tempfile, pathlib
from chipset.backends.capabilities import Capabilities
from chipset.backends.options import EngineOptions
from chipset.backends.registry import Registry
from chipset.core.conformance.checkpoint import FULL, make_checkpoint
from chipset.core.conformance.suite import running
from chipset.core.conformance.traffic import Arrival, make_submit, serve
from chipset.backends.step import StepBatch
plugin = Registry.discover().select("cpu").plugin
assert Capabilities(device_type="x").can_fly is False
assert StepBatch.__dataclass_fields__["adapters"].default is None
assert plugin.check_model(None) is None
files = make_checkpoint(FULL, pathlib.Path(tempfile.mkdtemp()))
with running(plugin, files, EngineOptions(dtype="float32", kv_bytes=1 << 20)) as engine:
    assert engine.runner.backend.runtime.health() == "well"
    answers = serve(engine, [Arrival(submit=make_submit(1, range(9), 5))])
assert len(answers[1].ids) == 5, answers
print("served")
"""


def test_a_plugin_serves_under_a_contract_that_has_gained_optional_members(tmp_path: Path) -> None:
    """The plugin's code is today's; the contract's copy has more."""
    package = tmp_path / "chipset"
    for name in ("backends", "core", "plugins"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "hw_matrix.yaml"):
        shutil.copy(ROOT / name, package / name)
    for name, (old, new) in NEWER.items():
        path = package / "backends" / name
        text = path.read_text()
        assert text.count(old) == 1, name
        path.write_text(text.replace(old, new))
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "served\n", done.stderr


def test_the_contract_imports_nothing_but_what_it_may() -> None:
    allowed = {"__future__", "abc", "collections", "contextlib", "dataclasses", "enum", "typing"}
    allowed |= {"numpy", "torch", "pluggy"}
    for name in MODULES:
        for line in (BACKENDS / f"{name}.py").read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and not words[1].startswith("."):
                assert words[1].split(".")[0] in allowed, f"{name}: {line}"
