"""Plugins come in by entry point, and a broken one stops nothing else."""

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
from fakes import NullPlugin

from chipset.backends.errors import BackendUnavailable, UnknownBackend
from chipset.backends.hookspecs import hookimpl
from chipset.backends.plugin import Probe
from chipset.backends.registry import GROUP, Registry


class Entry(SimpleNamespace):
    """An entry point whose module is made on the spot."""

    value = "made.on.the.spot"

    def load(self):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class Module:
    def __init__(self, plugin):
        self.plugin = plugin

    @hookimpl
    def backend_plugin(self):
        return self.plugin


def make_plugin(name="null", probe=None, **info):
    plugin = NullPlugin()
    plugin.info = replace(NullPlugin.info, name=name, **info)
    plugin.probe = lambda: probe or Probe(available=True, num_devices=1, reason="there")
    return plugin


def entry(name, plugin=None):
    result = plugin if isinstance(plugin, Exception) else Module(plugin or make_plugin(name))
    return Entry(name=name, result=result)


def discover(*entries, **environment):
    return Registry.discover(lambda: list(entries), environment)


def test_the_cpu_backend_comes_in_by_the_same_door_as_strangers():
    registry = Registry.discover(environment={})
    assert registry.plugins["cpu"].info.name == "cpu"
    assert registry.failures == {}


def test_a_module_that_raises_is_a_row_with_its_reason_and_others_still_load():
    registry = discover(entry("bad", ImportError("no such sdk")), entry("good"))
    assert list(registry.plugins) == ["good"]
    assert "no such sdk" in registry.failures["bad"].reason
    with pytest.raises(BackendUnavailable, match="no such sdk"):
        registry.select("bad")
    assert registry.select("good").plugin.info.name == "good"


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (make_plugin("odd", api_version=(0, 8)), "built for contract 0.8"),
        (make_plugin("odd", api_version=(1, 9)), "built for contract 1.9"),
        (make_plugin("other"), "brings a plugin named other"),
        (object(), "returned object"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_not_loaded(plugin, reason):
    assert reason in discover(entry("odd", plugin)).failures["odd"].reason


def test_a_module_without_the_hook_is_a_failure():
    registry = discover(Entry(name="odd", result=SimpleNamespace()))
    assert "implements no hook" in registry.failures["odd"].reason


def test_the_allow_list_keeps_everything_else_out():
    registry = discover(
        entry("a"), entry("b"), entry("c", RuntimeError("x")), CHIPSET_PLUGINS="b, z"
    )
    assert list(registry.plugins) == ["b"]
    assert not registry.failures


def test_an_unknown_name_is_refused_with_what_is_installed():
    with pytest.raises(UnknownBackend, match=r"'warp'.*null"):
        discover(entry("null")).select("warp")


def test_a_backend_that_is_planned_but_not_installed_says_so():
    with pytest.raises(BackendUnavailable, match=r"no plugin.*--backend cpu"):
        discover(entry("null")).select("gaudi")


def test_a_named_backend_that_finds_nothing_is_fatal_with_its_reason():
    absent = make_plugin(probe=Probe(available=False, num_devices=0, reason="no /dev/null0"))
    with pytest.raises(BackendUnavailable, match="no /dev/null0"):
        discover(entry("null", absent)).select("null")


def test_auto_takes_the_available_backend_of_highest_priority():
    def probe(**fields):
        return Probe(num_devices=1, reason="there", **({"available": True} | fields))

    registry = discover(
        entry("a", make_plugin("a", probe(priority=0))),
        entry("b", make_plugin("b", probe(priority=5))),
        entry("c", make_plugin("c", probe(priority=9, available=False))),
        entry("s", make_plugin("s", probe(priority=99, simulated=True))),
    )
    assert registry.select("auto").plugin.info.name == "b"


def test_auto_stops_at_hardware_that_cannot_be_used():
    broken = Probe(available=False, found_hardware=True, num_devices=0, reason="driver is missing")
    registry = discover(entry("a"), entry("b", make_plugin("b", broken)))
    with pytest.raises(BackendUnavailable, match=r"driver is missing.*--backend cpu"):
        registry.select("auto")


def test_discovery_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from chipset.backends.registry import Registry; Registry.discover().select('cpu');"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_group_is_the_documented_one():
    assert GROUP == "chipset.backends"
    assert EntryPoint(name="x", value="y", group=GROUP).group == GROUP
