"""A module's tensors on this rank, from the parts of the checkpoint's layers that it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .tensors import Module, Take

ModuleTensors: TypeAlias = Mapping[str, Tensor]
"""weight, bias, …: all tensors of one module, on the host."""


def plain_tensors(
    checkpoint: Checkpoint, module: Module, dtype: torch.dtype, kinds: tuple[str, ...]
) -> ModuleTensors:
    """Of some kinds, cast to `dtype`; only this rank's part is read. Raises RuntimeError where memory runs out."""
    return {kind: _plain_tensor(checkpoint, module, kind, dtype) for kind in kinds}


def _plain_tensor(checkpoint: Checkpoint, module: Module, kind: str, dtype: torch.dtype) -> Tensor:
    out = torch.empty(module.shape(kind), dtype=dtype)
    if kind == "bias" and not module.bias_is_here:
        return out.zero_()
    experts = out if module.num_experts else out.unsqueeze(0)
    for target, takes in zip(experts, module.takes, strict=True):
        parts = torch.split(target, list(module.parts))
        last: tuple[Take, Tensor] | None = None
        for part, take in zip(parts, takes, strict=True):
            if last is None or (last[0].layer, last[0].rows) != (take.layer, take.rows):
                last = take, _read(checkpoint, module, take, kind)
            _fill(part, last[1], take)
    return out


def _read(checkpoint: Checkpoint, module: Module, take: Take, kind: str) -> Tensor:
    rows, columns = slice(take.rows.start, take.rows.stop), None
    if kind == "weight" and module.columns is not None:
        columns = slice(module.columns.start, module.columns.stop)
    return checkpoint.read(take.layer, kind, rows, columns)


def _fill(target: Tensor, found: Tensor, take: Take) -> None:
    """Copy and cast; zero behind what is there."""
    if take.picked is not None:
        found = found[list(take.picked)]
    place = target[tuple(slice(size) for size in found.shape)]
    if place.shape != target.shape:
        target.zero_()
    place.copy_(found)
