"""What a model takes on a backend, found by loading it there; nothing is served."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..core.loading.resolve import find_model
from ..core.messages import Ready
from .background import in_background
from .client import EngineClient
from .console import Console
from .engine_process import COMMAND
from .launch import engine_launch
from .settings import ServerSettings


async def weigh(
    settings: ServerSettings, console: Console, command: Sequence[str] = COMMAND
) -> Ready:
    """What the engine says once it could serve. Raises what kept it from starting."""
    finding = partial(
        find_model, settings.model, revision=settings.revision, progress=console.progress
    )
    files = await in_background(finding)
    starting = EngineClient.start(engine_launch(settings, files), console.progress, command)
    async with starting as client:
        console.end_progress()
        return client.ready
