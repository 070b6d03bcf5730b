"""Packed weights that are read wrongly, multiplied by the wrong input, or held twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chipset.backends.quantization import LinearSpec, Verdict
from chipset.backends.reference.packed import KINDS, PackedLinear
from chipset.backends.reference.quantization import ReferenceLinear

from ..mutation import Mutation
from ..reference_plugin import ReferencePlugin

Tensors = Mapping[str, Tensor]
Misread = Callable[[LinearSpec, Tensors], Tensors]
"""Canonical tensors of a packed weight -> what is made of them, by name; those it leaves out stay."""
Around = Callable[[LinearSpec, PackedLinear], nn.Module]
"""A packed layer -> what stands in its place."""


class Packed(ReferenceLinear):
    """All kinds."""

    def __init__(self, runtime: Any) -> None:
        super().__init__(runtime, KINDS | {"plain"})


class OtherTensors(Packed):
    def __init__(self, runtime: Any, misread: Misread) -> None:
        super().__init__(runtime)
        self.misread = misread

    def build(self, spec: LinearSpec, tensors: Tensors) -> nn.Module:
        return super().build(spec, self._misread(spec, tensors))

    def build_experts(
        self,
        gate_up: LinearSpec,
        down: LinearSpec,
        tensors: Mapping[str, Tensors],
        activation: str,
    ) -> nn.Module:
        specs = {"gate_up": gate_up, "down": down}
        wrong = {name: self._misread(specs[name], of) for name, of in tensors.items()}
        return super().build_experts(gate_up, down, wrong, activation)

    def _misread(self, spec: LinearSpec, tensors: Tensors) -> Tensors:
        if spec.weight.kind == "plain":
            return tensors
        return {**tensors, **self.misread(spec, tensors)}


class OtherLayer(Packed):
    def __init__(self, runtime: Any, around: Around) -> None:
        super().__init__(runtime)
        self.around = around

    def build(self, spec: LinearSpec, tensors: Tensors) -> nn.Module:
        layer = super().build(spec, tensors)
        return self.around(spec, layer) if isinstance(layer, PackedLinear) else layer


class Credulous(Packed):
    def kernels(self, spec: LinearSpec) -> Sequence[Verdict]:
        return [Verdict(kernel="torch", ok=True, reason="why not")]


class RoundedInput(nn.Module):
    """Multiplies by x in 255 steps; the largest of a token, or of all, is the last."""

    def __init__(self, layer: nn.Module, *, by_token: bool) -> None:
        super().__init__()
        self.layer, self.by_token = layer, by_token

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        size = x.float().abs()
        scale = (size.amax(-1, keepdim=True) if self.by_token else size.max()) / 127
        found: tuple[Tensor, ...] = self.layer(((x / scale).round() * scale).to(x.dtype))
        return found


class Fading(nn.Module):
    """Scales its weight down with each call."""

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.layer(x)
        self.layer.weight.scale.mul_(0.9999)
        return found


def nibbles_swapped(spec: LinearSpec, tensors: Tensors) -> Tensors:
    weight = tensors["weight"]
    return {"weight": (weight >> 4) | (weight << 4)} if spec.weight.kind == "int4" else {}


def subnormals_lost(spec: LinearSpec, tensors: Tensors) -> Tensors:
    weight = tensors["weight"]
    if spec.weight.kind != "fp8":
        return {}
    return {"weight": torch.where(weight.float().abs() < 2**-6, 0.0, weight.float()).to(weight)}


def zero_point_one_up(spec: LinearSpec, tensors: Tensors) -> Tensors:
    return {"zero_point": tensors["zero_point"] + 1} if "zero_point" in tensors else {}


def zero_points_rounded(spec: LinearSpec, tensors: Tensors) -> Tensors:
    return {"zero_point": tensors["zero_point"].round()} if "zero_point" in tensors else {}


def zero_points_of_int8_forgotten(spec: LinearSpec, tensors: Tensors) -> Tensors:
    if spec.weight.kind != "int8" or "zero_point" not in tensors:
        return {}
    return {"zero_point": tensors["zero_point"] * 0}


def scale_of_the_neighbour(spec: LinearSpec, tensors: Tensors) -> Tensors:
    return {"scale": tensors["scale"].roll(1, -1)}


def scale_of_the_first_row(spec: LinearSpec, tensors: Tensors) -> Tensors:
    scale = tensors["scale"]
    return {"scale": scale[..., :1, :].expand_as(scale)}


def scale_of_the_first_expert(spec: LinearSpec, tensors: Tensors) -> Tensors:
    scale = tensors["scale"]
    return {"scale": scale[:1].expand_as(scale)} if spec.num_experts else {}


def block_axes_swapped(spec: LinearSpec, tensors: Tensors) -> Tensors:
    scale = tensors["scale"]
    is_square = spec.weight.block is not None and scale.shape[-1] == scale.shape[-2]
    return {"scale": scale.mT.contiguous()} if is_square else {}


def scale_rounded(spec: LinearSpec, tensors: Tensors) -> Tensors:
    return {"scale": tensors["scale"].bfloat16().float()}


def order_forgotten(spec: LinearSpec, tensors: Tensors) -> Tensors:
    if "order" not in tensors:
        return {}
    order = tensors["order"]
    columns = torch.arange(order.shape[-1], dtype=order.dtype).clamp(max=spec.in_features)
    return {"order": columns.expand_as(order)}


def order_turned_round(spec: LinearSpec, tensors: Tensors) -> Tensors:
    if "order" not in tensors:
        return {}
    order = tensors["order"]
    return {"order": order.argsort(-1).clamp(max=spec.in_features).to(order.dtype)}


def padding_multiplies(spec: LinearSpec, tensors: Tensors) -> Tensors:
    if "order" not in tensors:
        return {}
    return {"order": tensors["order"].clamp(max=spec.in_features - 1)}


def float_copy(spec: LinearSpec, layer: PackedLinear) -> nn.Module:
    layer.register_buffer("wide", layer.weight.dequantised())
    return layer


def one_scale_for_all_tokens(spec: LinearSpec, layer: PackedLinear) -> nn.Module:
    allowed = spec.weight.kind == "int8" and spec.weight.activation == "dynamic_token"
    return RoundedInput(layer, by_token=False) if allowed else layer


def input_rounded_unasked(spec: LinearSpec, layer: PackedLinear) -> nn.Module:
    asked = spec.weight.activation != "none"
    return layer if asked else RoundedInput(layer, by_token=True)


def fading(spec: LinearSpec, layer: PackedLinear) -> nn.Module:
    return Fading(layer)


def _mutation(name: str, mistake: str, linear: Callable[[Any], ReferenceLinear]) -> Mutation:
    return Mutation(
        name=name,
        area="quantization",
        mistake=mistake,
        plugin=lambda: ReferencePlugin(linear=linear),
    )


def _tensors(name: str, mistake: str, misread: Misread) -> Mutation:
    return _mutation(name, mistake, lambda runtime: OtherTensors(runtime, misread))


def _layer(name: str, mistake: str, around: Around) -> Mutation:
    return _mutation(name, mistake, lambda runtime: OtherLayer(runtime, around))


MUTATIONS: tuple[Mutation, ...] = (
    _tensors("nibbles swapped", "columns of int4 change places in pairs", nibbles_swapped),
    _tensors("subnormal weights lost", "fp8 below 2**-6 is read as 0", subnormals_lost),
    _tensors("zero point one up", "zero points are off by one", zero_point_one_up),
    _tensors("zero points rounded", "real zero points are made whole", zero_points_rounded),
    _tensors(
        "int8 without zero points", "those of int8 are ignored", zero_points_of_int8_forgotten
    ),
    _tensors("scale of the neighbour", "a group gets the next one's", scale_of_the_neighbour),
    _tensors("scale of the first row", "all rows get the first one's", scale_of_the_first_row),
    _tensors("scale of the first expert", "all get the first one's", scale_of_the_first_expert),
    _tensors("block axes swapped", "the scales of blocks are transposed", block_axes_swapped),
    _tensors("scale rounded", "scales are bfloat16 in a float32 model", scale_rounded),
    _tensors("order forgotten", "permuted columns are taken as they come", order_forgotten),
    _tensors("order turned round", "the order is applied the wrong way", order_turned_round),
    _tensors("padding multiplies", "columns for padding get the last input", padding_multiplies),
    _layer("weight held as floats too", "a layer keeps what it unpacked", float_copy),
    _layer("one scale for all tokens", "a large token coarsens the rest", one_scale_for_all_tokens),
    _layer("input rounded unasked", "inputs meant precise become int8", input_rounded_unasked),
    _layer("weight fades", "each call scales the weight down a little", fading),
    _mutation("any kind taken", "a kernel takes a kind that nobody knows", Credulous),
)
