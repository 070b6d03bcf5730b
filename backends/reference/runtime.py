"""The host as a device: nothing to copy, nothing to wait for."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any, Generic

import torch
from torch import Tensor

from ..runtime import ErrorClass, MemoryInfo, Pending, Runtime, T_co
from ..step import StepOutput
from .collectives import PeerLost


class Ready(Pending[T_co], Generic[T_co]):
    """A value that is there already."""

    def __init__(self, value: T_co) -> None:
        self._value = value

    def done(self) -> bool:
        """Always."""
        return True

    def result(self) -> T_co:
        """At once."""
        return self._value


class HostRuntime(Runtime):
    """Torch's CPU device."""

    @property
    def device(self) -> torch.device:
        """The one CPU."""
        return torch.device("cpu")

    def memory(self) -> MemoryInfo | None:
        """Of the whole machine, as the operating system counts pages."""
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = (page * os.sysconf(name) for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
        return MemoryInfo(free=free, total=total, peak=total - free, exact=False)

    def put(self, host: Tensor) -> Tensor:
        """The same tensor."""
        return host

    def fetch(self, output: StepOutput) -> Pending[StepOutput]:
        """Views of the tensors: they were made for this step and nobody writes to them again."""
        return Ready(
            StepOutput(**{f.name: _array(getattr(output, f.name)) for f in fields(output)})
        )

    def synchronize(self) -> None:
        """The host is its own device."""

    def classify(self, error: BaseException) -> ErrorClass:
        """Except for a lost rank, an exception takes nothing of the host with it: it can be laid at a request's door.

        Torch's allocator raises RuntimeError, so the words decide.
        """
        if isinstance(error, PeerLost):
            return "device_lost"
        words = ("not enough memory", "can't allocate memory")
        if isinstance(error, MemoryError) or any(said in str(error) for said in words):
            return "out_of_memory"
        return "request"


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.numpy()
