"""Packed weights in plain torch, as WeightFormat defines them: unpacked in the step, multiplied in float32.

Nothing here reads a value or makes an int64 tensor, and shapes depend on the format alone, so a compiler can take it as
it is and a device may hold it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantization import LinearSpec, WeightFormat
from .dtypes import torch_dtype
from .experts import Experts

KINDS = frozenset({"int4", "int8", "fp8"})
"""Of WeightFormat's table, all but plain."""


class PackedWeight(nn.Module):
    """The canonical tensors of one weight as buffers, and the product with it.

    A plain one has no scale. An input that the checkpoint means to be quantised is taken as it comes, which is more
    precise.
    """

    weight: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    order: Tensor | None

    def __init__(self, weight_format: WeightFormat, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.format = weight_format
        self.register_buffer("weight", tensors["weight"])
        self.register_buffer("scale", tensors.get("scale"))
        self.register_buffer("zero_point", tensors.get("zero_point"))
        self.register_buffer("order", tensors.get("order"))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in_features] -> float32 [T, N]."""
        return F.linear(in_order(x, self.order).float(), self.dequantised())

    def dequantised(self) -> Tensor:
        """float32 [N, K], its columns in the weight's own order."""
        numbers = unpacked(self.weight, self.format.kind)
        size = (numbers.shape[-2], numbers.shape[-1])
        if self.scale is None:
            return numbers
        if self.zero_point is not None:
            numbers = numbers - spread(self.zero_point, self.format, size)
        elif self.format.kind == "int4":
            numbers = numbers - 8
        return numbers * spread(self.scale, self.format, size)


class PackedLinear(nn.Module):
    """x [T, K] -> one [T, n] for each part."""

    bias: Tensor | None

    def __init__(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.parts = list(spec.parts)
        self.out_dtype = torch_dtype(spec.out_dtype)
        self.weight = PackedWeight(spec.weight, tensors)
        self.register_buffer("bias", tensors.get("bias"))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """See Linear.build."""
        return torch.split(self.product(x), self.parts, -1)

    def product(self, x: Tensor) -> Tensor:
        """[T, N] of the spec's output dtype, all parts side by side."""
        out: Tensor = self.weight(x)
        if self.bias is not None:
            out = out + self.bias.float()
        return out.to(self.out_dtype)


class PackedExperts(Experts):
    """At least one of the two weights is packed."""

    def __init__(
        self,
        gate_up: LinearSpec,
        down: LinearSpec,
        tensors: Mapping[str, Mapping[str, Tensor]],
        activation: str,
    ) -> None:
        super().__init__(gate_up.num_experts, activation)
        self.gate_up = expert_layers(gate_up, tensors["gate_up"])
        self.down = expert_layers(down, tensors["down"])

    def product(self, name: str, index: int, x: Tensor) -> Tensor:
        """See Experts.product."""
        layers = self.gate_up if name == "gate_up" else self.down
        layer = layers[index]
        assert isinstance(layer, PackedLinear)
        return layer.product(x)


def expert_layers(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.ModuleList:
    """A layer for each expert, over views of the tensors [E, ...]."""
    one = [{n: t[index] for n, t in tensors.items()} for index in range(spec.num_experts)]
    return nn.ModuleList(PackedLinear(spec, part) for part in one)


def in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """x [T, in_features] -> [T, K]: the columns that the weight's multiply, 0 where order says in_features."""
    return x if order is None else F.pad(x, (0, 1)).index_select(-1, order)


def unpacked(weight: Tensor, kind: str) -> Tensor:
    """float32 [N, K] of canonical numbers, not yet scaled."""
    if kind == "int4":
        weight = torch.stack((weight & 15, weight >> 4), -1).flatten(-2)
    return weight.float()


def spread(values: Tensor, weight_format: WeightFormat, size: tuple[int, int]) -> Tensor:
    """A scale or zero point of each group or block, for each number: broadcasts to `size`, (N, K)."""
    if weight_format.block is not None:
        return _repeat(_repeat(values, weight_format.block[0], 0), weight_format.block[1], 1)[
            : size[0], : size[1]
        ]
    if weight_format.group_size is not None:
        return _repeat(values, weight_format.group_size, 1)
    return values


def _repeat(values: Tensor, times: int, axis: int) -> Tensor:
    """Each entry along `axis` so many times in a row; torch's own would count them in int64."""
    wide = values.unsqueeze(axis + 1)
    shape = [-1] * wide.dim()
    shape[axis + 1] = times
    return wide.expand(shape).flatten(axis, axis + 1)
