"""Distributions that other people wrote: plugins in files of their own, found by their entry points."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

from chipset.backends.entries import GROUP

AVAILABLE = 'return Probe(available=True, num_devices=1, reason="there")'
_MODULE = """
import ctypes, os, time
from chipset.backends.hookspecs import hookimpl
from chipset.backends.plugin import API_VERSION, Plugin, PluginInfo, Probe
{at_import}

class Stranger(Plugin):
    info = PluginInfo(name={name!r}, api_version={version}, distribution="strangers", summary="a stranger")

    def probe(self):
        {probe}

    def capabilities(self, probe): ...
    def resolve(self, options, model, capabilities): ...
    def shapes(self, options, model): ...
    def create(self, launch): ...

{at_end}

@hookimpl
def backend_plugin():
    return {returns}
"""


def source(
    name: str,
    *,
    probe: str = AVAILABLE,
    at_import: str = "",
    at_end: str = "",
    version: str = "API_VERSION",
    returns: str = "Stranger()",
) -> str:
    """The text of a plugin's module."""
    return _MODULE.format(
        name=name, probe=probe, at_import=at_import, at_end=at_end, version=version, returns=returns
    )


BROKEN: Mapping[str, tuple[str, str]] = {
    "no-sdk": (source("no-sdk", at_import="import no_such_sdk"), "No module named 'no_such_sdk'"),
    "exits": (source("exits", at_import="raise SystemExit(3)"), "SystemExit: 3"),
    "old": (source("old", version="(0, 1)"), "built for contract 0.1"),
    "major": (source("major", version="(1, API_VERSION[1])"), "built for contract 1."),
    "partial": (source("partial").replace("def shapes", "def shaped"), "abstract method shapes"),
    "no-info": (source("no-info", at_end="del Stranger.info"), "has no PluginInfo"),
    "misnamed": (source("other"), "brings a plugin named other"),
    "no-plugin": (source("no-plugin", returns="object()"), "returned object, which is no Plugin"),
    "no-hook": ("", "implements no hook"),
    "raises": (source("raises", probe='raise OSError("device is wedged")'), "OSError: device is wedged"),
    "no-probe": (source("no-probe", probe="return None"), "returned NoneType"),
    "untold": (
        source("untold", probe='return Probe(available=True, num_devices=1, reason=b"")'),
        "cannot be told: TypeError",
    ),
    "dies": (source("dies", probe="os._exit(3)"), "ended its process with code 3 (probe)"),
    "crashes": (
        source("crashes", probe="ctypes.string_at(0)"),
        "ended its process by a signal: Segmentation fault (probe)",
    ),
}  # fmt: skip
"""By name: a module that cannot be used, and what the table must say of it, at once."""

HANGING: Mapping[str, tuple[str, str]] = {
    "slow": (source("slow", probe="time.sleep(60)"), "(probe)"),
    "slow-import": (source("slow-import", at_import="time.sleep(60)"), "(import)"),
    # native code that keeps the interpreter's lock: not a line of Python runs in that process
    "locks": (source("locks", probe="ctypes.PyDLL(None).sleep(60)"), "(probe)"),
}
"""Those that never answer."""


def write(folder: Path, modules: Mapping[str, str], distribution: str = "strangers") -> Path:
    """An installed distribution of these modules, one entry point each, as pip would leave it in `folder`."""
    info = folder / f"{distribution}-1.2.dist-info"
    info.mkdir(parents=True)
    entries = [f"{name} = {_module(name)}" for name in modules]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *entries, ""]))
    for name, text in modules.items():
        (folder / f"{_module(name)}.py").write_text(text)
    return folder


def entries(modules: Mapping[str, str]) -> list[EntryPoint]:
    """Of modules that `write` wrote, without looking for them."""
    return [EntryPoint(name, _module(name), GROUP) for name in modules]


def _module(name: str) -> str:
    return f"stranger_{name.replace('-', '_')}"
