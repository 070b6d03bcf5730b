"""From settings to what the engine process is told."""

from __future__ import annotations

from ..core.files import ModelFiles
from ..core.messages import EngineLaunch
from .settings import ServerSettings


def engine_launch(settings: ServerSettings, files: ModelFiles) -> EngineLaunch:
    """EngineClient.start fills in the addresses."""
    return EngineLaunch(
        commands="",
        events="",
        files=files,
        backend=settings.backend,
        options=settings.engine_options,
        quantize=settings.quantize,
        sharded=bool(settings.sharded) and settings.num_shard is None,
        prefix_cache=not settings.no_prefix_cache,
        preempt_every=settings.debug_preempt_every,
    )
