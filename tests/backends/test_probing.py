"""All plugins are asked in a process of their own, and each of them can spoil its own row and no other."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from strangers import AVAILABLE, BROKEN, HANGING, entries, source, write

from chipset.backends.entries import allowed_entries
from chipset.backends.probing import Finding, probe_all

GOOD = {"good": source("good"), "other-good": source("other-good")}


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Write modules and probe them."""

    def ask(modules: dict[str, str], budget_s: float = 30.0, **environment) -> dict[str, Finding]:
        monkeypatch.syspath_prepend(write(tmp_path / "site", modules))
        found = allowed_entries(entries(modules), environment)
        return {row.name: row for row in probe_all(found, environment, budget_s)}

    return ask


def test_every_way_to_be_broken_is_a_row_with_its_reason_and_spoils_no_other(ask):
    rows = ask({name: text for name, (text, _) in BROKEN.items()} | GOOD)
    assert list(rows) == sorted(BROKEN | GOOD)
    for name, (_, reason) in BROKEN.items():
        assert reason in rows[name].reason
        assert rows[name].probe is None
        assert "CHIPSET_PLUGINS" in rows[name].cure
    for name in GOOD:
        assert rows[name].probe.available
        assert (rows[name].summary, rows[name].reason) == ("a stranger", "there")
        assert rows[name].cure == ""


def test_what_hangs_costs_no_more_than_the_budget_and_no_other_row(ask):
    begin = time.monotonic()
    rows = ask({name: text for name, (text, _) in HANGING.items()} | GOOD, budget_s=5.0)
    took = time.monotonic() - begin
    assert took < 6.0
    for name, (_, stage) in HANGING.items():
        assert rows[name].probe is None
        assert rows[name].reason == f"did not answer within 5 s {stage}"
    assert all(rows[name].probe.available for name in GOOD)


def test_nothing_is_waited_for_once_all_have_answered(ask):
    begin = time.monotonic()
    assert ask(GOOD, budget_s=300.0)["good"].probe.available
    assert time.monotonic() - begin < 60.0


def test_all_that_a_probe_says_arrives(ask):
    probe = (
        'return Probe(available=False, num_devices=2, reason="driver 1 is too old", cure="install 2",'
        ' found_hardware=True, architecture="x9", priority=7, simulated=True)'
    )
    row = ask({"full": source("full", probe=probe)})["full"]
    assert (row.reason, row.cure) == ("driver 1 is too old", "install 2")
    assert (row.probe.found_hardware, row.probe.simulated, row.probe.available) == (1, 1, 0)
    assert (row.probe.num_devices, row.probe.architecture, row.probe.priority) == (2, "x9", 7)


def test_what_a_plugin_prints_is_no_answer(ask):
    noise = 'print(\'{"name": "loud", "failure": "x"}\', flush=True); os.system(\'echo noise\'); '
    assert ask({"loud": source("loud", probe=noise + AVAILABLE)})["loud"].probe.available


def test_no_process_is_left_behind(ask, tmp_path):
    note = tmp_path / "pids"
    probe = (
        'child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60")\n'
        f'        open({str(note)!r}, "w").write(f"{{os.getpid()}} {{child}}")\n'
        "        time.sleep(60)"
    )
    ask({"slow": source("slow", probe=probe)}, budget_s=2.0)
    pids = [int(pid) for pid in note.read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_allow_list_keeps_everything_else_out(ask):
    rows = ask(GOOD | {"slow": HANGING["slow"][0]}, CHIPSET_PLUGINS="good, absent")
    assert list(rows) == ["good"]


def test_without_entry_points_there_is_no_process_and_no_row():
    assert probe_all({}, {}) == []


def test_tracing_shows_each_hook_call(tmp_path):
    write(tmp_path, GOOD)
    code = "from chipset.backends.registry import Registry as R; r = R.discover(); r.select('cpu'); r.probe_all()"
    environment = {"PYTHONPATH": str(tmp_path), "CHIPSET_TRACE_PLUGINS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    calls = [line for line in done.stderr.splitlines() if "backend_plugin [hook]" in line]
    assert len(calls) >= 4  # cpu here, and all three in the helper
    assert done.stdout == ""


LOOKING = """
import os, sys
seen = {"import": set(), "open": set(), "process": set()}
def watch(event, args):
    if event == "import":
        seen["import"].add(args[0].split(".")[0])
    elif event in ("open", "os.open", "ctypes.dlopen") and isinstance(args[0], (str, bytes)):
        seen["open"].add(os.fsdecode(args[0]))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        seen["process"].add(event)
sys.addaudithook(watch)
from chipset.backends.entries import ask_probe, find_entries, load_plugin
for entry in find_entries():
    if entry.dist.name == "chipset":
        ask_probe(load_plugin(entry, {}))
vendors = {"torch", "transformers", "numpy", "pynvml", "amdsmi", "habana_frameworks", "torch_neuronx",
           "libneuronxla", "torch_xla", "torch_tpu", "libtpu", "jax", "triton"}
print(sorted(seen["import"] & vendors), sorted(p for p in seen["open"] if p.startswith("/dev/")),
      sorted(seen["process"]))
"""


def test_discovery_and_probes_import_no_vendor_package_and_open_no_device():
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOOKING], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout.split("\n")[0] == "[] [] []", done.stdout + done.stderr
