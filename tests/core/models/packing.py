"""Packed checkpoints, and a backend that takes every kind of weight and computes with the numbers it stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantizers import Recipe
from torch import Tensor, nn

from chipset.backends.formats import Packed, Scheme
from chipset.backends.quantization import LinearSpec, Verdict, WeightFormat
from chipset.backends.reference.quantization import ReferenceLinear
from chipset.backends.runtime import Runtime
from chipset.core.models.shard import WHOLE, Shard
from chipset.core.quantization.canonical import dequantise
from chipset.core.quantization.select import FORMATS

from .harness import Checkpoint, Session, TensorSource
from .ranks import Ranks

LAYERS = re.compile(r"(_proj|\.w[123]|query_key_value|dense|dense_h_to_4h|dense_4h_to_h)\.weight$")


@dataclass(frozen=True, kw_only=True)
class PackedCheckpoint:
    """Tensors as a recipe stores them, and what those are worth."""

    plain: Checkpoint
    scheme: Scheme
    stored: Mapping[str, Tensor]
    values: Mapping[str, Tensor]


def pack(checkpoint: Checkpoint, recipe: Recipe) -> PackedCheckpoint:
    """All linear layers but head and router."""
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in checkpoint.weights():
        if not LAYERS.search(name):
            stored[name] = values[name] = tensor
            continue
        written = recipe.layer(tensor.float(), 16.0)
        values[name] = written.value
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{kind}": part for kind, part in written.tensors.items()}
    return PackedCheckpoint(
        plain=checkpoint, scheme=scheme_of(recipe.config), stored=stored, values=values
    )


def scheme_of(config: Mapping[str, object]) -> Scheme:
    """As quantization_config says."""
    method = str(config["quant_method"]).replace("fbgemm_", "")
    return next(known for known in FORMATS if known.name == method).read(config)


class Unpacking(ReferenceLinear):
    """Remembers every spec."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.specs: list[LinearSpec] = []

    def kernels(self, spec: LinearSpec) -> Sequence[Verdict]:
        return (Verdict(kernel="any", ok=True, reason="takes all"),)

    def build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        self.specs.append(spec)
        weight = self.worth(spec, tensors)
        assert tuple(weight.shape) == (spec.out_features, spec.in_features)
        assert sum(spec.parts) == spec.out_features
        bias = {"bias": tensors["bias"]} if spec.bias else {}
        return super().build(plain(spec), {"weight": weight, **bias})

    def build_experts(
        self,
        gate_up: LinearSpec,
        down: LinearSpec,
        tensors: Mapping[str, Mapping[str, Tensor]],
        activation: str,
    ) -> nn.Module:
        self.specs += [gate_up, down]
        specs = {"gate_up": gate_up, "down": down}
        worth = {name: {"weight": self.worth(specs[name], of)} for name, of in tensors.items()}
        return super().build_experts(plain(gate_up), plain(down), worth, activation)

    def worth(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> Tensor:
        for name, tensor in tensors.items():
            held = tensor.untyped_storage().nbytes()
            assert held == tensor.nbytes, f"{spec.name}: {name} keeps a larger tensor alive"
        held = {name: tensor for name, tensor in tensors.items() if name != "bias"}
        return dequantise(Packed(format=spec.weight, tensors=held))


def plain(spec: LinearSpec) -> LinearSpec:
    """The same layer with a plain weight."""
    values = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    return LinearSpec(**{**values, "weight": WeightFormat()})


def open_session(packed: PackedCheckpoint, shard: Shard = WHOLE, **more: object) -> Session:
    """Of the stored tensors."""
    options: dict[str, object] = {"linear": Unpacking, "scheme": packed.scheme, **more}
    source = TensorSource(packed.stored.items())
    config = packed.plain.config
    return Session(packed.plain, config, source=source, shard=shard, **options)  # type: ignore[arg-type]


def run_packed(packed: PackedCheckpoint, size: int) -> list[tuple[Tensor, ...]]:
    """Of each rank, logits of every token of every text."""
    return Ranks(size).run(
        lambda rank, comm: open_session(packed, Shard(rank=rank, size=size), comm=comm).run(
            packed.plain.texts
        )
    )


def run_values(packed: PackedCheckpoint) -> tuple[Tensor, ...]:
    """The same of a plain checkpoint with the numbers that the packed one is worth."""
    session = Session(packed.plain, packed.plain.config, source=TensorSource(packed.values.items()))
    (logits,) = Ranks(1).run(lambda rank, comm: session.run(packed.plain.texts))
    return logits
