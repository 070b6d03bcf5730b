"""The emulated device as a Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ...backends.errors import UnexpectedCompile
from ...backends.reference.collectives import PeerLost
from ...backends.runtime import ErrorClass, MemoryInfo, Pending, Runtime
from ...backends.step import StepOutput
from . import device, watch
from .rules import RuleBroken

REFUSAL = "sim device refuses"


class Copy(Pending[StepOutput]):
    """A step's output, its fields of equal dtype end to end in one tensor on the device."""

    def __init__(self, output: StepOutput) -> None:
        named = {f.name: getattr(output, f.name) for f in fields(output)}
        self._fields: dict[str, Tensor] = {n: x for n, x in named.items() if x is not None}
        self._flat = {
            dtype: torch.cat([x.reshape(-1) for x in self._fields.values() if x.dtype == dtype])
            for dtype in {x.dtype for x in self._fields.values()}
        }

    def done(self) -> bool:
        """Always: the emulated device is synchronous."""
        return True

    def result(self) -> StepOutput:
        """One copy per dtype."""
        with watch.reading():
            host = {dtype: flat.cpu().numpy() for dtype, flat in self._flat.items()}
        found: dict[str, Any] = {}
        first = dict.fromkeys(host, 0)
        for name, tensor in self._fields.items():
            start, dtype = first[tensor.dtype], tensor.dtype
            first[dtype] = start + tensor.numel()
            found[name] = host[dtype][start : first[dtype]].reshape(tensor.shape)
        return StepOutput(**found)


class SimRuntime(Runtime):
    """One emulated device, and which of its rules hold."""

    def __init__(self, rules: Mapping[watch.Rule, bool], index: int) -> None:
        device.load()
        device.set_device(index)
        for rule, holds in rules.items():
            watch.set_rule(rule, holds)
        self._device = torch.device(device.NAME, index)

    @property
    def device(self) -> torch.device:
        """sim:0, or another of the emulated devices."""
        return self._device

    def memory(self) -> MemoryInfo | None:
        """Of the emulated device."""
        free, total = device.mem_get_info()
        return MemoryInfo(free=free, total=total, peak=device.max_memory_allocated())

    def put(self, host: Tensor) -> Tensor:
        """See Runtime.put."""
        if host.dtype == torch.int64:
            host = host.to(torch.int32)
        return host.to(self._device)

    def fetch(self, output: StepOutput) -> Pending[StepOutput]:
        """The copy starts here, before the next step overwrites the output."""
        return Copy(output)

    def synchronize(self) -> None:
        """See Runtime.synchronize."""
        device.synchronize()

    def classify(self, error: BaseException) -> ErrorClass:
        """A broken rule is nobody's request; what is unknown may be one's."""
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return "out_of_memory"
        if isinstance(error, RuleBroken | UnexpectedCompile) or REFUSAL in str(error):
            return "unknown"
        if isinstance(error, torch.AcceleratorError | PeerLost):
            return "device_lost"
        return "request"
