"""Executor: what the engine drives, one worker in its own process (a Runner) or many in theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from ...backends.plugin import Launch
from ...backends.runtime import ErrorClass
from ...backends.step import I32, StepBatch, StepOutput
from ..batch import BatchBuilder
from ..models.report import WeightReport

Reset: TypeAlias = tuple[int, I32 | None]
"""A request slot and what KVCache.reset_slot gets for it."""
Report: TypeAlias = Callable[[str, int, int, str], None]
"""How a start goes: phase, done, total, unit."""


class Executor(Protocol):
    """All workers do the same at the same time. Members raise what a worker raised, or WorkerDied."""

    builder: BatchBuilder
    """Makes the batches of `step`."""
    launch: Launch
    """That of rank 0."""
    weights: Sequence[WeightReport]
    """What each rank holds."""

    def budget(self) -> int:
        """Bytes for KV blocks on the device that has the fewest."""

    def block_bytes(self) -> list[int]:
        """Bytes of a block on a device, per KV group."""

    def allocate(self, num_blocks: Sequence[int]) -> None:
        """The cache, with so many blocks per KV group."""

    def warm_up(self, num_blocks: int, progress: Callable[[int, int], None]) -> None:
        """Compile what will be needed, then promise that nothing more is."""

    def step(self, batch: StepBatch, resets: Sequence[Reset] = ()) -> StepOutput | None:
        """Run one step and wait for what it drew; None where it draws nothing."""

    def classify(self, error: Exception) -> ErrorClass:
        """What a step that raised means."""

    def replace_lost_cache(self) -> bool:
        """After a step that raised: allocate anew if the step took the cache with it. Whether it had."""

    def counters(self) -> dict[str, float]:
        """What the backends count themselves, by name; summed over the ranks."""

    def check(self) -> None:
        """Between steps, at least every second or two. Raises WorkerDied where a worker is gone."""

    def close(self) -> None:
        """Free the caches and leave the devices."""
