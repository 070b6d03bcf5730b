"""Who waits for the device, when, and how often: counted from outside a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic

import torch

from ..backend import Backend
from ..kv_cache import Cache, KVBlob
from ..runtime import Pending, T_co
from ..step import I32, StepOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What happened since the watch began; those of the device are 0 where it cannot say."""

    waits: int
    """Pending.result() of a fetch."""
    synchronizes: int
    """Of Runtime, and of the device's own module."""
    reads: int
    """Copies from the device to the host."""
    reads_outside: int
    """Those of them not made within result() of a fetch or an export."""
    uploads: int
    """Copies from the host to the device."""
    refused: int
    """What the device refused to do."""

    def __sub__(self, other: Counts) -> Counts:
        """What happened in between."""
        names = self.__dataclass_fields__
        return Counts(**{name: getattr(self, name) - getattr(other, name) for name in names})


class Watch:
    """Stands before the runtime of a backend and counts.

    A device module of torch (`torch.<device type>`) that has a member `watch` with `counts()` and `reading()`, as an
    emulated device has, is asked as well; others are trusted to wait in result() only.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._waits = self._synchronizes = self._reads_within = 0
        module = torch.get_device_module(backend.runtime.device)
        self._device: Any = getattr(module, "watch", None)
        self._reads_before = 0 if self._device is None else self._device.counts().reads
        runtime, kv = backend.runtime, backend.kv
        self._fetch, self._synchronize = runtime.fetch, runtime.synchronize
        self._export = kv.export_blocks
        # the objects stay the plugin's own, which may know them by members that the contract does not name
        runtime.fetch = self._watched_fetch  # type: ignore[method-assign]
        runtime.synchronize = self._watched_synchronize  # type: ignore[method-assign]
        kv.export_blocks = self._watched_export  # type: ignore[method-assign]

    @property
    def sees_device(self) -> bool:
        """Whether reads, uploads and refusals are counted by the device itself."""
        return self._device is not None

    def counts(self) -> Counts:
        """As of now."""
        device = None if self._device is None else self._device.counts()
        reads = 0 if device is None else device.reads - self._reads_before
        return Counts(
            waits=self._waits,
            synchronizes=self._synchronizes + (0 if device is None else device.synchronizes),
            reads=reads,
            reads_outside=reads - self._reads_within,
            uploads=0 if device is None else device.uploads,
            refused=0 if device is None else sum(device.refused.values()),
        )

    def waited(self) -> None:
        """A fetch was waited for."""
        self._waits += 1

    def read(self, pending: Pending[T_co]) -> T_co:
        """result(), within which the device may be read."""
        if self._device is None:
            return pending.result()
        before = self._device.counts().reads
        with self._device.reading():
            result = pending.result()
        self._reads_within += self._device.counts().reads - before
        return result

    def _watched_fetch(self, output: StepOutput) -> Pending[StepOutput]:
        return _Watched(self._fetch(output), self, is_step=True)

    def _watched_synchronize(self) -> None:
        self._synchronizes += 1
        self._synchronize()

    def _watched_export(self, cache: Cache, group: int, blocks: I32) -> Pending[KVBlob]:
        return _Watched(self._export(cache, group, blocks), self, is_step=False)


class _Watched(Pending[T_co], Generic[T_co]):
    def __init__(self, pending: Pending[T_co], watch: Watch, *, is_step: bool) -> None:
        self._pending, self._watch, self._is_step = pending, watch, is_step

    def done(self) -> bool:
        return self._pending.done()

    def result(self) -> T_co:
        if self._is_step:
            self._watch.waited()
        return self._watch.read(self._pending)
