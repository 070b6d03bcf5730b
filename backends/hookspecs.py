"""The start-up hooks. None is called in the step loop."""

from __future__ import annotations

import pluggy

from .plugin import Plugin

PROJECT = "chipset"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def backend_plugin() -> Plugin:  # type: ignore[empty-body]
    """The plugin that an entry point of the group `chipset.backends` brings.

    Cheap: no SDK and no device until create.
    """
