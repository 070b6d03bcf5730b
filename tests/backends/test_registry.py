"""Plugins come in by entry point, and a broken one stops nothing else."""

import subprocess
import sys
import time
from importlib.metadata import EntryPoint

import pytest
from strangers import BROKEN, HANGING, entries, source, write

from chipset.backends.entries import GROUP
from chipset.backends.errors import BackendUnavailable, UnknownBackend
from chipset.backends.registry import Registry


def probe(available=True, **fields):
    """The body of a stranger's probe."""
    given = {"available": available, "num_devices": 1, "reason": "there"} | fields
    return f"return Probe(**{given!r})"


@pytest.fixture
def discover(tmp_path, monkeypatch):
    """A registry of these modules, by name, which are forgotten after the test."""

    def discover(modules, **environment):
        monkeypatch.syspath_prepend(write(tmp_path / "site", modules))
        return Registry.discover(lambda: entries(modules), environment)

    yield discover
    for name in [name for name in sys.modules if name.startswith("stranger_")]:
        del sys.modules[name]


def test_the_cpu_backend_comes_in_by_the_same_door_as_strangers():
    registry = Registry.discover(environment={})
    assert "cpu" in registry.names
    assert registry.load("cpu").info.name == "cpu"
    assert registry.select("cpu").plugin.info.name == "cpu"


@pytest.mark.parametrize("name", [n for n in BROKEN if n not in ("dies", "crashes", "untold")])
def test_a_broken_plugin_that_is_asked_for_is_fatal_with_its_reason(discover, name):
    module, reason = BROKEN[name]
    with pytest.raises(BackendUnavailable, match=f"backend {name} ") as error:
        discover({name: module, "good": source("good")}).select(name)
    assert reason in str(error.value)


def test_a_named_backend_is_loaded_and_probed_here_and_no_other_is_even_imported(discover):
    registry = discover({"good": source("good"), "slow": HANGING["slow-import"][0]})
    begin = time.monotonic()
    assert registry.select("good").reason == "asked for; there"
    assert time.monotonic() - begin < 1.0
    assert "stranger_good" in sys.modules
    assert "stranger_slow" not in sys.modules


def test_the_allow_list_keeps_everything_else_out(discover):
    modules = {name: source(name) for name in "abc"}
    registry = discover(modules, CHIPSET_PLUGINS="b, z")
    assert registry.names == ["b"]
    assert registry.excluded == ["a", "c"]
    with pytest.raises(BackendUnavailable, match="a is left out by CHIPSET_PLUGINS"):
        registry.select("a")


def test_of_two_with_one_name_the_first_that_is_found_counts(discover):
    discover({"good": source("good"), "other": source("other")})
    first, second = (EntryPoint("good", f"stranger_{name}", GROUP) for name in ("good", "other"))
    assert Registry.discover(lambda: [first, second], {}).load("good").info.name == "good"
    with pytest.raises(BackendUnavailable, match="brings a plugin named other"):
        Registry.discover(lambda: [second, first], {}).load("good")


def test_an_unknown_name_is_refused_with_what_is_installed(discover):
    with pytest.raises(UnknownBackend, match=r"'warp'.*null"):
        discover({"null": source("null")}).select("warp")


def test_a_backend_that_is_planned_but_not_installed_says_so(discover):
    with pytest.raises(BackendUnavailable, match=r"no plugin.*--backend cpu"):
        discover({"null": source("null")}).select("gaudi")


def test_a_named_backend_that_finds_nothing_is_fatal_with_its_reason_and_cure(discover):
    absent = probe(available=False, reason="no /dev/null0", cure="plug one in")
    with pytest.raises(BackendUnavailable, match="no /dev/null0; plug one in"):
        discover({"null": source("null", probe=absent)}).select("null")


def test_auto_takes_the_available_backend_of_highest_priority(discover):
    registry = discover(
        {
            "a": source("a", probe=probe(priority=0)),
            "b": source("b", probe=probe(priority=5, architecture="b9", num_devices=3)),
            "c": source("c", probe=probe(priority=9, available=False)),
            "s": source("s", probe=probe(priority=99, simulated=True)),
        }
    )
    selection = registry.select("auto")
    assert selection.plugin.info.name == "b"
    assert (selection.probe.architecture, selection.probe.num_devices) == ("b9", 3)
    assert selection.reason == "auto; there"


def test_auto_stops_at_hardware_that_cannot_be_used(discover):
    broken = probe(available=False, found_hardware=True, reason="driver is missing", cure="add it")
    registry = discover({"a": source("a"), "b": source("b", probe=broken)})
    with pytest.raises(
        BackendUnavailable, match=r"b hardware.*driver is missing; add it, or take --backend cpu"
    ):
        registry.select("auto")


def test_hardware_that_is_only_simulated_does_not_stop_auto(discover):
    broken = probe(available=False, found_hardware=True, simulated=True)
    assert discover({"a": source("a"), "b": source("b", probe=broken)}).select("auto")


def test_auto_passes_over_what_is_broken_and_says_so(discover):
    modules = {name: BROKEN[name][0] for name in ("no-sdk", "raises", "dies")}
    selection = discover(modules | {"good": source("good")}).select("auto")
    assert selection.plugin.info.name == "good"
    for name in modules:
        assert f"{name}: " in selection.reason
        assert BROKEN[name][1] in selection.reason


def test_auto_without_a_usable_backend_says_what_it_looked_at(discover):
    modules = {"a": source("a", probe=probe(available=False)), "no-sdk": BROKEN["no-sdk"][0]}
    with pytest.raises(BackendUnavailable, match=r"among a; passed over no-sdk: .*no_such_sdk"):
        discover(modules).select("auto")


def test_auto_only_loads_here_what_it_takes(discover):
    modules = {"alone": source("alone", probe=probe(priority=1)), "left": source("left")}
    assert discover(modules).select("auto").plugin.info.name == "alone"
    assert "stranger_alone" in sys.modules
    assert "stranger_left" not in sys.modules


def test_discovery_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from chipset.backends.registry import Registry; r = Registry.discover();"
        "r.select('cpu'); r.select('auto');"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_group_is_the_documented_one():
    assert GROUP == "chipset.backends"
    assert EntryPoint(name="x", value="y", group=GROUP).group == GROUP
