"""What became of a model's weights on a device. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightReport:
    """Of one rank."""

    held_bytes: int
    """See held_bytes."""
    kernels: Mapping[str, int] = field(default_factory=dict)
    """Linear layers by kind of weight and kernel: "int4 by torch"."""
    dequantised: Mapping[str, int] = field(default_factory=dict)
    """Layers that the checkpoint holds packed and the device holds plain, by reason."""
    dequantised_bytes: int = 0
    """Memory that these take more than their packed form would."""


def held_bytes(module: nn.Module) -> int:
    """Of all parameters and buffers of a model, tables of positions too: whole storages, each once."""
    storages: dict[object, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_mkldnn:  # has no storage that could be looked at
            storages[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
