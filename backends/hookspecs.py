"""The start-up hooks. None is called in the step loop."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from .formats import CheckpointFormat
from .plugin import Plugin

PROJECT = "chipset"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def backend_plugin() -> Plugin:  # type: ignore[empty-body]
    """The plugin that an entry point of the group `chipset.backends` brings.

    Cheap: no SDK and no device until create.
    """


@hookspec
def quantization_formats() -> Sequence[CheckpointFormat]:  # type: ignore[empty-body]
    """Formats that the module of an entry point brings beside its plugin, served when that plugin is the one in use.

    They come before those of the core, so that a name of the core's may be taken over.
    """
