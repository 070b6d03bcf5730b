"""From entry points to plugins by name: the one place that joins the engine to an accelerator."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint

from .entries import (
    ALLOW_VARIABLE,
    allowed_entries,
    ask_probe,
    find_entries,
    load_formats,
    load_plugin,
)
from .errors import BackendUnavailable, PluginError, UnknownBackend
from .formats import CheckpointFormat
from .options import BACKENDS
from .plugin import Plugin, Probe
from .probing import Finding, probe_all


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The plugin to use, what it found, and why it was taken."""

    plugin: Plugin
    probe: Probe
    reason: str


class Registry:
    """The plugins that are installed. A named one is loaded here and alone; all of them only in a helper process."""

    def __init__(self, entries: Sequence[EntryPoint], environment: Mapping[str, str]) -> None:
        self._entries = allowed_entries(entries, environment)
        self._environment = environment
        self.excluded = sorted({entry.name for entry in entries} - self._entries.keys())
        """Installed, and left out by CHIPSET_PLUGINS."""

    @classmethod
    def discover(
        cls,
        entries: Callable[[], Sequence[EntryPoint]] = find_entries,
        environment: Mapping[str, str] = os.environ,
    ) -> Registry:
        """The entry points that CHIPSET_PLUGINS allows (unset: all). Imports none of them."""
        return cls(entries(), environment)

    @property
    def names(self) -> Sequence[str]:
        """What --backend may name, beside auto."""
        return list(self._entries)

    def load(self, name: str) -> Plugin:
        """Import one plugin, in this process, and no other. Raises UnknownBackend or BackendUnavailable."""
        try:
            return load_plugin(self._entry(name), self._environment)
        except PluginError as error:
            raise BackendUnavailable(f"backend {name} could not be loaded: {error}") from error

    def formats(self, name: str) -> Sequence[CheckpointFormat]:
        """Formats of quantised checkpoints that a plugin brings. Raises UnknownBackend or BackendUnavailable."""
        try:
            return load_formats(self._entry(name), self._environment)
        except PluginError as error:
            raise BackendUnavailable(f"backend {name} could not be loaded: {error}") from error

    def probe_all(self) -> Sequence[Finding]:
        """A row for each plugin, by a helper process; nothing that one of them does stops another, or this process."""
        return probe_all(self._entries, self._environment)

    def select(self, name: str) -> Selection:
        """The plugin for --backend `name`. `auto` takes the available one of highest priority.

        Raises UnknownBackend or BackendUnavailable, with the reason and the cure.
        """
        if name == "auto":
            return self._select_best()
        plugin = self.load(name)
        try:
            probe = ask_probe(plugin)
        except PluginError as error:
            raise BackendUnavailable(f"backend {name} is not available: {error}") from error
        if not probe.available:
            cure = f"; {probe.cure}" if probe.cure else ""
            raise BackendUnavailable(f"backend {name} is not available: {probe.reason}{cure}")
        return Selection(plugin=plugin, probe=probe, reason=f"asked for; {probe.reason}")

    def _entry(self, name: str) -> EntryPoint:
        if name in self._entries:
            return self._entries[name]
        if name in self.excluded:
            raise BackendUnavailable(
                f"backend {name} is left out by {ALLOW_VARIABLE}; add it there"
            )
        installed = ", ".join(self._entries) or "none"
        if name in BACKENDS:
            raise BackendUnavailable(
                f"backend {name}: no plugin of that name is installed (installed: {installed}); "
                "use --backend cpu, or install a distribution that brings it"
            )
        raise UnknownBackend(f"no backend named {name!r}; installed: {installed}, auto")

    def _select_best(self) -> Selection:
        findings = self.probe_all()
        probes = {f.name: f.probe for f in findings if f.probe and not f.probe.simulated}
        for name, probe in probes.items():
            if probe.found_hardware and not probe.available:
                raise BackendUnavailable(
                    f"auto found {name} hardware that cannot be used: {probe.reason}; "
                    f"{probe.cure or 'mend that'}, or take --backend cpu"
                )
        usable = [name for name, probe in probes.items() if probe.available]
        # a plugin that is broken is told, and stops nothing
        broken = [f"{f.name}: {f.reason}" for f in findings if f.probe is None]
        warning = f"; passed over {'; '.join(broken)}" if broken else ""
        if not usable:
            looked = ", ".join(sorted(probes)) or "none installed"
            raise BackendUnavailable(f"auto found no usable backend among {looked}{warning}")
        best = max(usable, key=lambda name: probes[name].priority)
        reason = f"auto; {probes[best].reason}{warning}"
        return Selection(plugin=self.load(best), probe=probes[best], reason=reason)
