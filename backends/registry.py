"""From entry points to plugins by name: the one place that joins the engine to an accelerator."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import pluggy

from . import hookspecs
from .errors import BackendUnavailable, UnknownBackend
from .options import BACKENDS
from .plugin import API_VERSION, Plugin, Probe

GROUP = "chipset.backends"
ALLOW_VARIABLE = "CHIPSET_PLUGINS"
TRACE_VARIABLE = "CHIPSET_TRACE_PLUGINS"


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An entry point that could not be loaded: a row in the probe table, never silence."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The plugin to use, what it found, and why it was taken."""

    plugin: Plugin
    probe: Probe
    reason: str


class Registry:
    """The plugins of one process, each loaded in its own try so that a broken one stops nothing else."""

    def __init__(self, plugins: Mapping[str, Plugin], failures: Mapping[str, Failure]) -> None:
        self.plugins = dict(plugins)
        self.failures = dict(failures)

    @classmethod
    def discover(
        cls,
        entries: Callable[[], list[EntryPoint]] = lambda: list(entry_points(group=GROUP)),
        environment: Mapping[str, str] = os.environ,
    ) -> Registry:
        """Load the entry points of the group `chipset.backends` that CHIPSET_PLUGINS allows (unset: all)."""
        allowed = environment.get(ALLOW_VARIABLE)
        names = None if allowed is None else {n.strip() for n in allowed.split(",") if n.strip()}
        plugins: dict[str, Plugin] = {}
        failures: dict[str, Failure] = {}
        for entry in sorted(entries(), key=lambda entry: entry.name):
            if names is not None and entry.name not in names:
                continue
            try:
                plugin = _load(entry, trace=bool(environment.get(TRACE_VARIABLE)))
            except Exception as error:  # a stranger's module may raise anything at all
                reason = f"{type(error).__name__}: {error}"
                failures[entry.name] = Failure(name=entry.name, reason=reason)
            else:
                plugins[entry.name] = plugin
        return cls(plugins, failures)

    def select(self, name: str) -> Selection:
        """The plugin for --backend `name`. `auto` takes the available one of highest priority.

        Raises UnknownBackend or BackendUnavailable, with the reason and the cure.
        """
        if name == "auto":
            return self._select_best()
        if name in self.failures:
            raise BackendUnavailable(
                f"backend {name} could not be loaded: {self.failures[name].reason}"
            )
        if name not in self.plugins:
            installed = ", ".join(sorted(self.plugins)) or "none"
            if name in BACKENDS:
                raise BackendUnavailable(
                    f"backend {name}: no plugin of that name is installed (installed: {installed}); "
                    "use --backend cpu, or install a distribution that brings it"
                )
            raise UnknownBackend(f"no backend named {name!r}; installed: {installed}, auto")
        plugin = self.plugins[name]
        probe = plugin.probe()
        if not probe.available:
            raise BackendUnavailable(f"backend {name} is not available: {probe.reason}")
        return Selection(plugin=plugin, probe=probe, reason=f"asked for; {probe.reason}")

    def _select_best(self) -> Selection:
        probes = {name: plugin.probe() for name, plugin in self.plugins.items()}
        for name, probe in probes.items():
            if probe.found_hardware and not probe.available and not probe.simulated:
                raise BackendUnavailable(
                    f"auto found {name} hardware that cannot be used: {probe.reason}; "
                    "mend that, or take --backend cpu"
                )
        usable = [n for n, probe in probes.items() if probe.available and not probe.simulated]
        if not usable:
            raise BackendUnavailable(
                f"auto found no usable backend among {', '.join(sorted(probes)) or 'none installed'}"
            )
        best = max(usable, key=lambda name: probes[name].priority)
        reason = f"auto; {probes[best].reason}"
        return Selection(plugin=self.plugins[best], probe=probes[best], reason=reason)


def _load(entry: EntryPoint, *, trace: bool) -> Plugin:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    if trace:
        manager.trace.root.setwriter(lambda line: os.write(2, line.encode()) and None)
        manager.enable_tracing()
    manager.register(entry.load(), name=entry.name)
    manager.check_pending()
    found = manager.hook.backend_plugin()
    if not found:
        raise TypeError(f"{entry.value} implements no hook backend_plugin")
    plugin = found[0]
    if not isinstance(plugin, Plugin):
        raise TypeError(f"backend_plugin of {entry.value} returned {type(plugin).__name__}")
    if plugin.info.api_version != API_VERSION:
        have, want = (".".join(map(str, v)) for v in (plugin.info.api_version, API_VERSION))
        raise TypeError(f"built for contract {have}, this is {want}")
    if plugin.info.name != entry.name:
        raise TypeError(f"entry point {entry.name} brings a plugin named {plugin.info.name}")
    return plugin
