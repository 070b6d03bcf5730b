"""`chipset doctor`: every backend with its reason and its cure, whatever a stranger's plugin does."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from strangers import BROKEN, HANGING, source, write

from chipset.backends.matrix import Matrix
from chipset.backends.options import BACKENDS
from chipset.backends.registry import Registry
from chipset.core.loading.cache import Cache
from chipset.server.doctor import diagnose
from chipset.server.machine import Machine
from chipset.server.versions import installed_version, required_packages

STRANGERS = {name: text for name, (text, _) in (BROKEN | HANGING).items()}


def python(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process that finds the distributions in `folder`, and its caches there, too."""
    caches = {"CHIPSET_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hub")}
    environment = {**os.environ, "PYTHONPATH": str(folder), **caches, **variables}
    return subprocess.run(
        [sys.executable, "-P", *arguments], capture_output=True, text=True, env=environment
    )


def rows(text: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(text)["backends"]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a distribution of broken plugins is installed, one of each kind, and one that works."""
    folder = tmp_path_factory.mktemp("site")
    probe = 'return Probe(available=False, num_devices=0, reason="no card", cure="buy [one]")'
    return write(folder, STRANGERS | {"cardless": source("cardless", probe=probe)})


def test_every_broken_plugin_is_shown_with_its_reason_and_nothing_else_is_hurt(site: Path) -> None:
    begin = time.monotonic()
    done = python("-m", "chipset", "doctor", "--json", folder=site)
    took = time.monotonic() - begin
    assert (done.returncode, done.stderr) == (0, "")
    assert took < 8.0
    found = rows(done.stdout)
    for name, (_, reason) in (BROKEN | HANGING).items():
        assert reason in found[name]["reason"]
        assert found[name]["installed"]
        assert not found[name]["available"]
        assert "uninstall" in found[name]["cure"]
        assert (found[name]["distribution"], found[name]["version"]) == ("strangers", "1.2")
    for name in HANGING:
        assert "did not answer within 5 s" in found[name]["reason"]
    assert found["cardless"]["cure"] == "buy [one]"
    assert found["cpu"]["available"]


def test_the_backends_that_work_still_serve(site: Path) -> None:
    code = (
        "import time\n"
        "from chipset.backends.registry import Registry\n"
        "from chipset.server.cli import _check_backend\n"
        "for name in ('cpu', 'auto'):\n"
        "    begin = time.monotonic()\n"
        "    _check_backend(name)\n"
        "    taken = Registry.discover().select(name)\n"
        "    print(taken.plugin.info.name, time.monotonic() - begin, taken.reason, sep='|')\n"
    )
    done = python("-c", code, folder=site)
    assert done.returncode == 0, done.stderr
    named, auto = (line.split("|") for line in done.stdout.splitlines())
    assert named[0] == "cpu"
    assert float(named[1]) < 1.0
    assert auto[0] == "cpu"
    assert float(auto[1]) < 6.0
    assert all(f"{name}: " in auto[2] for name in STRANGERS)


def test_it_is_for_people_too(site: Path) -> None:
    done = python("-m", "chipset", "doctor", folder=site, CHIPSET_PLUGINS="cpu,cardless,no-sdk")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "available" in lines["cpu"]
    assert "no card; buy [one]" in lines["cardless"]
    assert "No module named 'no_such_sdk'" in lines["no-sdk"]
    assert "left out by CHIPSET_PLUGINS" in lines["slow"]
    for name in ("processor", "memory", "python", "cache", "torch", "transformers"):
        assert name in lines


def test_it_ends_with_1_where_no_backend_can_serve(site: Path) -> None:
    done = python("-m", "chipset", "doctor", "--json", folder=site, CHIPSET_PLUGINS="cardless")
    assert done.returncode == 1
    assert not any(row["available"] for row in rows(done.stdout).values())


def test_a_simulator_alone_serves_nobody(tmp_path: Path) -> None:
    probe = 'return Probe(available=True, num_devices=1, reason="a toy", simulated=True)'
    write(tmp_path, {"toy": source("toy", probe=probe)})
    done = python("-m", "chipset", "doctor", "--json", folder=tmp_path, CHIPSET_PLUGINS="toy")
    assert done.returncode == 1
    assert rows(done.stdout)["toy"]["available"]


def test_it_imports_no_plugin_and_no_torch_itself(tmp_path: Path) -> None:
    write(tmp_path, {"good": source("good")})
    code = (
        "import sys\nfrom chipset.server.cli import main\n"
        "try:\n    main(['doctor', '--json'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "unwanted = ('torch', 'transformers', 'stranger_good', 'chipset.plugins.cpu')\n"
        "print([name for name in unwanted if name in sys.modules], file=sys.stderr)\n"
    )
    done = python("-c", code, folder=tmp_path)
    assert rows(done.stdout)["good"]["available"]
    assert done.stderr.strip() == "[]"


def test_every_planned_backend_is_named_with_its_evidence(tmp_path: Path) -> None:
    found = diagnose(Registry([], {}), Cache(tmp_path / "none" / "yet"))
    named = {one.name: one for one in found.backends}
    assert set(BACKENDS) <= set(named)
    assert not any(one.installed for one in found.backends)
    assert set(named["cpu"].evidence) == {"hardware"}
    assert not named["tpu"].evidence
    assert [one.package for one in named["cpu"].versions] == ["python", "torch"]
    assert named["cpu"].versions[0].installed == installed_version("python")
    assert list(found.compilers) == list(Matrix.load().compilers)
    assert found.cache.free_bytes > 0
    assert str(found.cache.folder) in found.as_text()


def test_packages_are_held_against_what_the_distribution_wants() -> None:
    packages = {package.name: package for package in required_packages()}
    assert {"torch", "tokenizers", "transformers", "uvloop"} <= set(packages)
    assert "pytest" not in packages
    assert packages["torch"].wanted == ">=2.9"
    assert all(package.fits for package in packages.values())
    assert installed_version("no-such-distribution") is None


def test_the_tightest_control_group_is_found(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    own = cgroups / "pod" / "box"
    own.mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        "MemTotal:  4096 kB\nMemAvailable:  1024 kB\nHugePages_Total: 0\n"
    )
    (proc / "cpuinfo").write_text("processor : 0\nmodel name : Abacus 9\n")
    (proc / "self" / "cgroup").write_text("0::/pod/box\n")
    (own / "memory.max").write_text("max\n")
    (own.parent / "memory.max").write_text("2097152\n")
    machine = Machine.read(proc, cgroups)
    assert machine.processor == "Abacus 9"
    assert machine.memory_bytes == 4 * 2**20
    assert machine.available_bytes == 2**20
    assert machine.memory_limit_bytes == 2 * 2**20


def test_a_limit_of_the_first_version_above_the_memory_is_none(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (cgroups / "memory").mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  4096 kB\n")
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/elsewhere\n")
    (cgroups / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert Machine.read(proc, cgroups).memory_limit_bytes is None
    (cgroups / "memory" / "memory.limit_in_bytes").write_text("1048576\n")
    assert Machine.read(proc, cgroups).memory_limit_bytes == 2**20


def test_a_machine_that_tells_nothing_is_still_told(tmp_path: Path) -> None:
    machine = Machine.read(tmp_path, tmp_path)
    assert machine.memory_bytes is None
    assert machine.cores >= machine.usable_cores >= 1
