"""The device: memory, copies to it, and the one wait a step may have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from .step import StepOutput

T_co = TypeVar("T_co", covariant=True)
ErrorClass = Literal["out_of_memory", "device_lost", "request", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryInfo:
    """Bytes of a device."""

    free: int
    """Of the device, for anyone."""
    total: int
    """Of the device."""
    peak: int
    """Most that was in use, by this process where the device can tell."""
    exact: bool = True
    """False: an estimate."""


class Pending(ABC, Generic[T_co]):
    """A value on its way from the device."""

    @abstractmethod
    def done(self) -> bool:
        """Whether result() would return at once."""

    @abstractmethod
    def result(self) -> T_co:
        """Waits."""


class Runtime(ABC):
    """One thread drives a backend, with gradients off from warm-up on. It changes no global state of torch later."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Always with an index, except for the CPU."""

    @abstractmethod
    def memory(self) -> MemoryInfo | None:
        """None where the device cannot say."""

    @abstractmethod
    def put(self, host: Tensor) -> Tensor:
        """Host to device at load time, replicated under SPMD. int64 may become int32; float dtypes never change."""

    @abstractmethod
    def fetch(self, output: StepOutput) -> Pending[StepOutput]:
        """May start a copy, never waits. Called right after its step and before the next.

        result() makes at most one copy per dtype to the host and one wait, in the thread that calls it. A device error
        may surface there, when the next step is out already: the core treats both as failed. Steps that draw and score
        nothing are not fetched. The arrays of result() stay as they are while later steps run. The widths of the fields
        are whatever was handed in, not only what drawing gives: the conformance kit reads other values through them.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Outside steps only: load, warm-up, measurements."""

    def classify(self, error: BaseException) -> ErrorClass:  # noqa: ARG002
        """What a failed step means; the default gives up.

        request: the core repeats the step in halves until the request at fault stands alone, and ends that one; what a
        step writes are slots of its own rows only, so repeating it is harmless.  out_of_memory: the same, and steps
        stay smaller for a while.  device_lost, unknown: the engine ends, and is started anew from outside.
        """
        return "unknown"
