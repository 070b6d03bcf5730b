"""What the plugin reads of a machine, from files that look like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from chipset.plugins.cpu.cpuinfo import architecture, multiplies_bfloat16
from chipset.plugins.cpu.memory import available_bytes, total_bytes
from chipset.plugins.cpu.threads import num_threads

GIB = 2**30
MEMINFO = f"MemTotal: {16 * 2**20} kB\nMemFree: 1024 kB\nMemAvailable: {10 * 2**20} kB\n"


class Machine:
    """A /proc and a /sys/fs/cgroup."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        self.write("proc/meminfo", MEMINFO, root)
        self.root = root

    def write(self, path: str, text: object, root: Path | None = None) -> None:
        file = (root or self.root) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def available(self) -> int:
        return available_bytes(self.proc, self.cgroups)

    def threads(self, num_cpus: int, **environment: str) -> int:
        return num_threads(self.proc, self.cgroups, environment, num_cpus)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


class TestMemory:
    def test_without_control_groups_it_is_what_the_kernel_says(self, machine: Machine) -> None:
        assert machine.available() == 10 * GIB
        assert total_bytes(machine.proc) == 16 * GIB

    def test_version_2_counts_reclaimable_cache_as_free(self, machine: Machine) -> None:
        machine.write("proc/self/cgroup", "0::/")
        machine.write("cgroup/memory.max", 4 * GIB)
        machine.write("cgroup/memory.current", 3 * GIB)
        machine.write("cgroup/memory.stat", f"anon {GIB}\ninactive_file {GIB}\nactive_file 5")
        assert machine.available() == 2 * GIB

    def test_the_tightest_group_above_binds(self, machine: Machine) -> None:
        machine.write("proc/self/cgroup", "0::/user.slice/server.scope")
        for folder, most in (("user.slice", 6), ("user.slice/server.scope", 8)):
            machine.write(f"cgroup/{folder}/memory.max", most * GIB)
            machine.write(f"cgroup/{folder}/memory.current", GIB)
        assert machine.available() == 5 * GIB

    def test_no_limit_is_no_limit(self, machine: Machine) -> None:
        machine.write("cgroup/memory.max", "max")
        machine.write("cgroup/memory.current", 3 * GIB)
        assert machine.available() == 10 * GIB

    def test_version_1_in_a_container_reads_its_own_root(self, machine: Machine) -> None:
        machine.write("proc/self/cgroup", "4:cpu,memory:/docker/abc\n0::/")
        machine.write("cgroup/memory/memory.limit_in_bytes", 2 * GIB)
        machine.write("cgroup/memory/memory.usage_in_bytes", GIB)
        machine.write("cgroup/memory/memory.stat", f"total_inactive_file {GIB // 2}")
        assert machine.available() == GIB + GIB // 2

    def test_a_group_beyond_its_limit_leaves_nothing(self, machine: Machine) -> None:
        machine.write("cgroup/memory.max", GIB)
        machine.write("cgroup/memory.current", 2 * GIB)
        assert machine.available() == 0

    def test_where_nothing_can_be_read_nothing_is_promised(self, tmp_path: Path) -> None:
        assert available_bytes(tmp_path / "none", tmp_path / "none") == 0
        assert total_bytes(tmp_path / "none") == 0

    def test_this_machine_has_some(self) -> None:
        assert 0 < available_bytes() <= total_bytes()


class TestThreads:
    def test_as_many_as_cpus(self, machine: Machine) -> None:
        assert machine.threads(6) == 6

    def test_the_variable_decides(self, machine: Machine) -> None:
        assert machine.threads(6, OMP_NUM_THREADS="9") == 9
        assert machine.threads(6, OMP_NUM_THREADS="") == 6
        assert machine.threads(6, OMP_NUM_THREADS="many") == 6

    @pytest.mark.parametrize(
        ("quota", "threads"), [("150000 100000", 2), ("max 100000", 6), ("1000 100000", 1)]
    )
    def test_a_quota_of_version_2_is_rounded_up(
        self, machine: Machine, quota: str, threads: int
    ) -> None:
        machine.write("cgroup/cpu.max", quota)
        assert machine.threads(6) == threads

    @pytest.mark.parametrize(("quota", "threads"), [("300000", 3), ("-1", 6)])
    def test_a_quota_of_version_1(self, machine: Machine, quota: str, threads: int) -> None:
        machine.write("cgroup/cpu/cpu.cfs_quota_us", quota)
        machine.write("cgroup/cpu/cpu.cfs_period_us", "100000")
        assert machine.threads(6) == threads

    def test_this_machine_has_one_at_least(self) -> None:
        assert num_threads(environment={}) >= 1


class TestArchitecture:
    @pytest.mark.parametrize(
        ("text", "name", "native"),
        [
            ("flags\t\t: fpu avx avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "amx_bf16", True),
            ("flags\t\t: fpu avx avx2 avx512f avx512_bf16", "avx512_bf16", True),
            ("flags\t\t: fpu avx avx2 avx512f", "avx512", False),
            ("processor\t: 0\nflags\t\t: fpu avx avx2", "avx2", False),
            ("Features\t: fp asimd bf16 sve", "arm_bf16", True),
            ("Features\t: fp asimd", "neon", False),
        ],
    )
    def test_the_best_extension_counts(
        self, tmp_path: Path, text: str, name: str, native: bool
    ) -> None:
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(text + "\n")
        assert architecture(cpuinfo) == name
        assert multiplies_bfloat16(name) == native

    @pytest.mark.parametrize("text", [None, "", "flags : fpu"])
    def test_without_known_flags_it_is_the_name_of_the_machine(
        self, tmp_path: Path, text: str | None
    ) -> None:
        cpuinfo = tmp_path / "cpuinfo"
        if text is not None:
            cpuinfo.write_text(text)
        assert architecture(cpuinfo)
        assert not multiplies_bfloat16(architecture(cpuinfo))
