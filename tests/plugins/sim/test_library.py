"""Building the emulated device's library: once, whole or not at all, with a cure where it cannot be."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chipset.backends.errors import BackendUnavailable
from chipset.plugins.sim.library import Library

FAKE_COMPILER = """#!/bin/sh
echo run >> "{log}"
while [ "$1" != "-o" ]; do shift; done
sleep 0.2
echo built > "$2"
"""

OTHER_KEY = """
import types, torch
from chipset.plugins.sim.library import Library
torch.ops.load_library(Library(key="HPU").build())
module = types.ModuleType("torch.hpu")
module.is_initialized = lambda: True
module._lazy_init = lambda: None
torch._register_device_module("hpu", module)
x = torch.ones(2, 2).to("hpu")
assert (x @ x).device == torch.device("hpu:0")
try:
    x.cpu()
except torch.AcceleratorError:
    print("refused")
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHIPSET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    path = tmp_path / "compiler"
    path.write_text(FAKE_COMPILER.format(log=tmp_path / "log"))
    path.chmod(0o755)
    return path


def test_it_lies_in_the_cache_that_the_environment_names(cache: Path, compiler: Path) -> None:
    path = Library(compiler=str(compiler)).build()
    assert path.read_text() == "built\n"
    assert path.is_relative_to(cache / "build")


def test_it_is_built_once(compiler: Path, tmp_path: Path) -> None:
    library = Library(compiler=str(compiler))
    assert library.build() == library.build()
    assert (tmp_path / "log").read_text() == "run\n"


def test_two_may_build_at_once_and_leave_nothing_behind(compiler: Path) -> None:
    library, built = Library(compiler=str(compiler)), []
    threads = [threading.Thread(target=lambda: built.append(library.build())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [library.path()] * 2
    assert list(library.path().parent.iterdir()) == [library.path()]


def test_another_key_is_another_library() -> None:
    assert Library().path() != Library(key="HPU").path()


def test_without_a_compiler_the_error_names_the_cure() -> None:
    with pytest.raises(BackendUnavailable, match=r"no-such-compiler.*apt-get install g\+\+"):
        Library(compiler="no-such-compiler").build()


def test_a_build_that_fails_says_why_and_leaves_no_library(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'device.cpp:1: error: no such torch' >&2\nexit 1\n")
    broken.chmod(0o755)
    library = Library(compiler=str(broken))
    with pytest.raises(BackendUnavailable, match="error: no such torch"):
        library.build()
    assert not library.path().exists()


@pytest.mark.slow
def test_the_same_source_makes_a_device_under_another_of_torch_s_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CHIPSET_CACHE")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", OTHER_KEY],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "refused\n", done.stderr
