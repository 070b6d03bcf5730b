"""Entry points of the group `chipset.backends`, and the way from one to the plugin that it brings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points

import pluggy

from . import hookspecs
from .errors import PluginError
from .formats import CheckpointFormat
from .plugin import API_VERSION, Plugin, PluginInfo, Probe

GROUP = "chipset.backends"
ALLOW_VARIABLE = "CHIPSET_PLUGINS"
TRACE_VARIABLE = "CHIPSET_TRACE_PLUGINS"


def find_entries() -> Sequence[EntryPoint]:
    """Of every distribution on sys.path. Reads their metadata and imports none of their modules."""
    return list(entry_points(group=GROUP))


def allowed_entries(
    entries: Sequence[EntryPoint], environment: Mapping[str, str]
) -> Mapping[str, EntryPoint]:
    """By name, in the order of names; those that CHIPSET_PLUGINS names (unset: all).

    Of two with the same name the one that is found first counts, as it does for modules.
    """
    allowed = environment.get(ALLOW_VARIABLE)
    names = None if allowed is None else {name.strip() for name in allowed.split(",")}
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        if names is None or entry.name in names:
            found.setdefault(entry.name, entry)
    return found


def load_plugin(entry: EntryPoint, environment: Mapping[str, str]) -> Plugin:
    """Import an entry point's module and ask its hook. Raises PluginError with the reason, whatever goes wrong."""
    try:
        found = _ask_hook(entry, environment)
        return _checked(entry, found)
    except (KeyboardInterrupt, PluginError):
        raise
    except BaseException as error:  # a stranger's module may raise anything, SystemExit included
        raise PluginError(said(error)) from error


def ask_probe(plugin: Plugin) -> Probe:
    """What `plugin.probe` finds. Raises PluginError with the reason, whatever goes wrong."""
    try:
        probe = plugin.probe()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # as above
        raise PluginError(f"its probe failed: {said(error)}") from error
    if not isinstance(probe, Probe):
        raise PluginError(f"its probe returned {type(probe).__name__} where a Probe is due")
    return probe


def said(error: BaseException) -> str:
    """One line: the class of an error and what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def load_formats(entry: EntryPoint, environment: Mapping[str, str]) -> Sequence[CheckpointFormat]:
    """Formats of quantised checkpoints that an entry point's module brings. Raises PluginError with the reason."""
    try:
        found = _manager(entry, environment).hook.quantization_formats()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # as above
        raise PluginError(said(error)) from error
    formats = [one for brought in found for one in brought]
    for one in formats:
        if not isinstance(one, CheckpointFormat):
            raise PluginError(
                f"quantization_formats of {entry.value} returned {type(one).__name__}, "
                "which is no CheckpointFormat"
            )
    return formats


def _manager(entry: EntryPoint, environment: Mapping[str, str]) -> pluggy.PluginManager:
    """With the hooks of one entry point's module, which is imported."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    if environment.get(TRACE_VARIABLE):
        manager.trace.root.setwriter(lambda line: os.write(2, line.encode()) and None)
        manager.enable_tracing()
    manager.register(entry.load(), name=entry.name)
    manager.check_pending()
    return manager


def _ask_hook(entry: EntryPoint, environment: Mapping[str, str]) -> object:
    found = _manager(entry, environment).hook.backend_plugin()
    if not found:
        raise PluginError(f"{entry.value} implements no hook backend_plugin")
    return found[0]


def _checked(entry: EntryPoint, plugin: object) -> Plugin:
    if not isinstance(plugin, Plugin):
        raise PluginError(
            f"backend_plugin of {entry.value} returned {type(plugin).__name__}, which is no Plugin"
        )
    info = getattr(plugin, "info", None)
    if not isinstance(info, PluginInfo):
        raise PluginError(f"{type(plugin).__name__} has no PluginInfo as its member info")
    if info.api_version != API_VERSION:
        have, want = (".".join(map(str, version)) for version in (info.api_version, API_VERSION))
        raise PluginError(f"built for contract {have}, this is {want}")
    if info.name != entry.name:
        raise PluginError(f"entry point {entry.name} brings a plugin named {info.name}")
    return plugin
