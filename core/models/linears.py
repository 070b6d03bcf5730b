"""Linear layers of a model: from a module's weights, packed or plain, to what the backend makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...backends.formats import Packed, Scheme
from ...backends.quantization import EmbeddingSpec, Linear, LinearSpec, WeightFormat
from ..layers.linear import SideBySide, bias_parts, find_kernel, require_kernel
from .checkpoint import Checkpoint
from .packed import PackedReader
from .tensors import Module
from .weights import plain_tensors

_LOOKED_UP = "embeddings are looked up row by row"


class LinearBuilder:
    """Builds one module at a time, and counts what became of their weights."""

    def __init__(
        self, linear: Linear, checkpoint: Checkpoint, scheme: Scheme | None, dtype: str
    ) -> None:
        self.kernels: Counter[str] = Counter()
        """Layers by kind of weight and kernel."""
        self._linear = linear
        self._checkpoint = checkpoint
        self._dtype_name = dtype
        self._dtype: torch.dtype = getattr(torch, dtype)
        self.packed = None if scheme is None else PackedReader(checkpoint, scheme, self._dtype)
        """Counts what it dequantised."""

    def build(self, module: Module) -> nn.Module:
        """x [T, in_features] -> one [T, n] for each part."""
        spec = self._spec(module)
        bias = plain_tensors(self._checkpoint, module, self._dtype, module.kinds[1:])
        reader = self._reader(module)
        if reader is None:
            plain = plain_tensors(self._checkpoint, module, self._dtype, ("weight",))
            return self._build(spec, {**plain, **bias})
        parts = reader.parts(module, module.takes[0])
        joined = reader.joined(parts)
        if joined is not None:
            return self._build_packed(reader, spec, joined, bias)
        biases = bias_parts(bias.get("bias"), module.parts)
        return SideBySide(
            [
                self._build_packed(reader, _one_part(spec, index), part, own)
                for index, (part, own) in enumerate(zip(parts, biases, strict=True))
            ]
        )

    def build_embedding(
        self, module: Module, first_row: int, *, is_tied: bool
    ) -> tuple[nn.Module, nn.Module | None]:
        """The embedding, and the head where it is the same weight."""
        reader = self._reader(module)
        if reader is None:
            weight = plain_tensors(self._checkpoint, module, self._dtype, ("weight",))["weight"]
        else:
            (packed,) = reader.parts(module, module.takes[0])
            weight = reader.dequantise(packed, _LOOKED_UP).tensors["weight"]
        spec = self._spec(module)
        table = EmbeddingSpec(
            first_row=first_row,
            num_rows=spec.out_features,
            hidden_size=spec.in_features,
            dtype=spec.dtype,
            shard="out",
        )
        if not is_tied:
            return self._linear.build_embedding(table, weight, None)
        head = self._spec(replace(module, name="head"))
        self._count(head)
        return self._linear.build_embedding(table, weight, head)

    def build_experts(self, gate_up: Module, down: Module, activation: str) -> nn.Module:
        """x [T, H], weights f32 [T, k], ids i32 [T, k] -> [T, H]. Both projections are packed, or none is."""
        modules = {"gate_up": gate_up, "down": down}
        specs = {name: self._spec(module) for name, module in modules.items()}
        tensors: dict[str, Mapping[str, Tensor]] = {}
        packed: dict[str, tuple[PackedReader, Packed]] = {}
        for name, module in modules.items():
            reader = self._reader(module)
            if reader is None:
                tensors[name] = plain_tensors(self._checkpoint, module, self._dtype, ("weight",))
            else:
                packed[name] = reader, reader.stacked(module)
                specs[name] = replace(specs[name], weight=packed[name][1].format)
        refused = self._why_not(tuple(specs.values()))
        for name, (reader, weight) in packed.items():
            if refused is None and weight.format.kind != "plain":
                tensors[name] = weight.tensors
            else:
                tensors[name] = reader.dequantise(weight, refused or "").tensors
                specs[name] = replace(specs[name], weight=WeightFormat())
        for spec in specs.values():
            self._count(spec)
        return self._linear.build_experts(specs["gate_up"], specs["down"], tensors, activation)

    def _why_not(self, specs: Sequence[LinearSpec]) -> str | None:
        """Why experts cannot stay packed."""
        if len({spec.weight.kind == "plain" for spec in specs}) > 1:
            return "one of the experts' projections is plain"
        for kernel, reason in (find_kernel(self._linear, spec) for spec in specs):
            if kernel is None:
                return reason
        return None

    def _reader(self, module: Module) -> PackedReader | None:
        """Where any of a module's layers is packed."""
        takes = (take for takes in module.takes for take in takes)
        return self.packed if any(self._checkpoint.is_packed(t.layer) for t in takes) else None

    def _build_packed(
        self,
        reader: PackedReader,
        spec: LinearSpec,
        weight: Packed,
        bias: Mapping[str, Tensor],
    ) -> nn.Module:
        spec = replace(spec, weight=weight.format)
        kernel, reason = find_kernel(self._linear, spec)
        if kernel is not None and weight.format.kind != "plain":
            return self._build(spec, {**weight.tensors, **bias})
        plain = reader.dequantise(weight, reason)
        return self._build(replace(spec, weight=WeightFormat()), {**plain.tensors, **bias})

    def _build(self, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        self._count(spec)
        return self._linear.build(spec, tensors)

    def _count(self, spec: LinearSpec) -> None:
        self.kernels[f"{spec.weight.kind} by {require_kernel(self._linear, spec)}"] += 1

    def _spec(self, module: Module) -> LinearSpec:
        assert module.columns is not None  # or it would be a norm
        return LinearSpec(
            name=module.name,
            in_features=module.columns.size,
            out_features=sum(module.parts),
            parts=module.parts,
            bias="bias" in module.kinds,
            dtype=self._dtype_name,
            out_dtype="float32" if module.name == "head" else self._dtype_name,
            shard=module.cut,
            num_experts=module.num_experts,
        )


def _one_part(spec: LinearSpec, index: int) -> LinearSpec:
    size = spec.parts[index]
    return replace(spec, name=f"{spec.name}.{index}", out_features=size, parts=(size,))
