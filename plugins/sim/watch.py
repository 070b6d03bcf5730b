"""What the emulated device saw and refused, and the permit to read it; torch.sim.watch once the device is loaded.

before = watch.counts()
...                             # a step
with watch.reading():           # the one place that may read
    pending.result()
assert (watch.counts() - before).reads == 1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

Rule = Literal["int64", "negative_index", "host_index", "infinity"]
"""What may be switched: int64 tensors allocated, put, made or passed; indices below 0 or out of range; host tensors as
index; and (off unless asked for) infinities as constants of an operator or in its floating result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceCounts:
    """Since the process started; subtract two for what happened between."""

    reads: int
    """Copies from the device to the host, each with a permit."""
    uploads: int
    """Copies from the host to the device."""
    uploads_by_dtype: Mapping[str, int]
    """Dtype on the device ("int32") -> copies."""
    uploaded_bytes: int
    kernels: int
    """Operators run, copies on the device among them; views run nothing."""
    synchronizes: int
    refused: Mapping[str, int]
    """Kind -> times. The kinds: read, data_dependent, dynamic_shape, boolean_index, host_argument, other_device,
    foreign_memory, and the names of rules. Assert on these, for a backend may swallow an error."""

    def __sub__(self, before: DeviceCounts) -> DeviceCounts:
        """Names that did not move are left out of the mappings."""
        return DeviceCounts(
            reads=self.reads - before.reads,
            uploads=self.uploads - before.uploads,
            uploads_by_dtype=_moved(self.uploads_by_dtype, before.uploads_by_dtype),
            uploaded_bytes=self.uploaded_bytes - before.uploaded_bytes,
            kernels=self.kernels - before.kernels,
            synchronizes=self.synchronizes - before.synchronizes,
            refused=_moved(self.refused, before.refused),
        )


def counts() -> DeviceCounts:
    """Of all devices and threads of this process."""
    found: dict[str, int] = torch.ops.chipset_device.counts()
    return DeviceCounts(
        reads=found["reads"],
        uploads=found["uploads"],
        uploads_by_dtype=_named(found, "uploads."),
        uploaded_bytes=found["uploaded_bytes"],
        kernels=found["kernels"],
        synchronizes=found["synchronizes"],
        refused=_named(found, "refused."),
    )


@contextmanager
def reading() -> Iterator[None]:
    """This thread, and no other, may read the device. Nests."""
    torch.ops.chipset_device.permit(1)
    try:
        yield
    finally:
        torch.ops.chipset_device.permit(-1)


def set_rule(name: Rule, on: bool) -> bool:
    """For the whole process; returns what it was. Raises ValueError where there is no such rule."""
    was: bool = torch.ops.chipset_device.set_rule(name, on)
    return was


@contextmanager
def rule(name: Rule, on: bool) -> Iterator[None]:
    """Switch a rule, and back."""
    was = set_rule(name, on)
    try:
        yield
    finally:
        set_rule(name, was)


def _named(found: Mapping[str, int], prefix: str) -> Mapping[str, int]:
    return {key.removeprefix(prefix): n for key, n in found.items() if key.startswith(prefix)}


def _moved(after: Mapping[str, int], before: Mapping[str, int]) -> Mapping[str, int]:
    moved = {name: n - before.get(name, 0) for name, n in after.items()}
    return {name: n for name, n in moved.items() if n}
