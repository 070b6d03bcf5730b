"""Linear layers, embeddings and experts that multiply by the wrong thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chipset.backends.quantization import EmbeddingSpec, LinearSpec, Verdict
from chipset.backends.reference.experts import PlainExperts
from chipset.backends.reference.quantization import (
    PlainEmbedding,
    PlainLinear,
    ReferenceLinear,
)

from ..mutation import Mutation
from ..reference_plugin import ReferencePlugin


class BiasTwice(ReferenceLinear):
    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        held = dict(tensors)
        if "bias" in held:
            held["bias"] = held["bias"] * 2
        return super().build(spec, held)


class BiasForgotten(ReferenceLinear):
    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        return super().build(spec, {"weight": tensors["weight"]})


class PartsSwapped(ReferenceLinear):
    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        parts = {name: list(tensor.split(spec.parts)) for name, tensor in tensors.items()}
        mixed = {
            name: torch.cat([*some[:-2], *reversed(some[-2:])]) for name, some in parts.items()
        }
        return super().build(spec, mixed)


class OnePart(ReferenceLinear):
    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        return super().build(replace(spec, parts=(spec.out_features,)), tensors)


class WideLayersCut(ReferenceLinear):
    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        kept = torch.arange(spec.out_features) < 256
        cut = {name: (tensor.T * kept).T for name, tensor in tensors.items()}
        return super().build(spec, cut)


class NarrowHead(ReferenceLinear):
    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        return _Widened(super().build(replace(spec, out_dtype=spec.dtype), tensors))


class _Widened(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.float() for part in self.layer(x))


class HeadCopied(ReferenceLinear):
    def build_embedding(
        self, spec: EmbeddingSpec, weight: Tensor, tied_head: LinearSpec | None
    ) -> tuple[nn.Module, nn.Module | None]:
        embedding, _ = super().build_embedding(spec, weight, None)
        head = None if tied_head is None else PlainLinear(tied_head, weight.clone(), None)
        return embedding, head


class _EdgeRows(PlainEmbedding):
    def forward(self, ids: Tensor) -> Tensor:
        row = (ids - self.first_row).clamp(0, self.num_rows - 1)
        return self.weight.index_select(0, row)


class _WrappedRows(PlainEmbedding):
    def forward(self, ids: Tensor) -> Tensor:
        mine = (ids >= self.first_row) & (ids < self.first_row + self.num_rows)
        found = self.weight.index_select(0, ids % self.num_rows)
        return torch.where(mine[:, None], found, 0.0)


class _LastRowLost(PlainEmbedding):
    def forward(self, ids: Tensor) -> Tensor:
        last = self.first_row + self.num_rows - 1
        return torch.where((ids == last)[:, None], 0.0, super().forward(ids))


class EmbeddingOf(ReferenceLinear):
    kind: type[PlainEmbedding]

    def build_embedding(
        self, spec: EmbeddingSpec, weight: Tensor, tied_head: LinearSpec | None
    ) -> tuple[nn.Module, nn.Module | None]:
        _, head = super().build_embedding(spec, weight, tied_head)
        return self.kind(spec, weight), head


class EdgeRows(EmbeddingOf):
    kind = _EdgeRows


class WrappedRows(EmbeddingOf):
    kind = _WrappedRows


class LastRowLost(EmbeddingOf):
    kind = _LastRowLost


class _Equal(PlainExperts):
    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().forward(x, torch.full_like(weights, 1 / weights.shape[1]), ids)


class _Renormalised(PlainExperts):
    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().forward(x, weights / weights.sum(-1, keepdim=True), ids)


class _FirstOnly(PlainExperts):
    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().forward(x, weights[:, :1], ids[:, :1])


class _OfOneToken(PlainExperts):
    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().forward(x, weights, ids[:1].expand_as(ids))


class ExpertsOf(ReferenceLinear):
    kind: type[PlainExperts]

    def build_experts(
        self,
        gate_up: LinearSpec,
        down: LinearSpec,
        tensors: Mapping[str, Mapping[str, Tensor]],
        activation: str,
    ) -> nn.Module:
        return self.kind(tensors["gate_up"], tensors["down"], activation)


class Equal(ExpertsOf):
    kind = _Equal


class Renormalised(ExpertsOf):
    kind = _Renormalised


class FirstOnly(ExpertsOf):
    kind = _FirstOnly


class OfOneToken(ExpertsOf):
    kind = _OfOneToken


class GateAndUpSwapped(ReferenceLinear):
    def build_experts(
        self,
        gate_up: LinearSpec,
        down: LinearSpec,
        tensors: Mapping[str, Mapping[str, Tensor]],
        activation: str,
    ) -> nn.Module:
        gate, up = tensors["gate_up"]["weight"].chunk(2, 1)
        swapped = {"weight": torch.cat((up, gate), 1)}
        return super().build_experts(gate_up, down, {**tensors, "gate_up": swapped}, activation)


class PlainRefused(ReferenceLinear):
    def kernels(self, spec: LinearSpec) -> Sequence[Verdict]:
        return (Verdict(kernel="torch", ok=False, reason="not today"),)


class ReasonLeftOut(ReferenceLinear):
    def kernels(self, spec: LinearSpec) -> Sequence[Verdict]:
        return [replace(verdict, reason="") for verdict in super().kernels(spec)]


def _mutation(name: str, mistake: str, linear: Callable[[Any], ReferenceLinear]) -> Mutation:
    return Mutation(
        name=name, area="linear", mistake=mistake, plugin=lambda: ReferencePlugin(linear=linear)
    )


MUTATIONS: tuple[Mutation, ...] = (
    _mutation("bias twice", "the bias is added twice", BiasTwice),
    _mutation("bias forgotten", "a layer with a bias adds none", BiasForgotten),
    _mutation("parts swapped", "the last two parts change places", PartsSwapped),
    _mutation("one part", "the parts come back as one", OnePart),
    _mutation("wide layers cut", "outputs from 256 on are zero", WideLayersCut),
    _mutation("narrow head", "logits are float32 that bfloat16 rounded", NarrowHead),
    _mutation("tied weight held twice", "the tied head copies the weight", HeadCopied),
    _mutation("edge rows for others", "another rank's ids get a row of the edge", EdgeRows),
    _mutation("rows wrapped", "a part of the vocabulary forgets where it begins", WrappedRows),
    _mutation("last row lost", "the last row of the vocabulary is zeros", LastRowLost),
    _mutation("experts weigh the same", "each chosen expert counts the same", Equal),
    _mutation("weights normalised again", "given weights are scaled to add up to 1", Renormalised),
    _mutation("first expert only", "the other chosen experts are left out", FirstOnly),
    _mutation("experts of one token", "all tokens take the first one's experts", OfOneToken),
    _mutation("gate and up swapped", "experts activate the wrong half", GateAndUpSwapped),
    _mutation("plain weights refused", "no kernel takes plain weights", PlainRefused),
    _mutation("reason left out", "a verdict does not say why", ReasonLeftOut),
)
