"""A module's weights in canonical form on this rank, from layers that a checkpoint holds packed or that get packed.

enclosing entries of each stored tensor ──pack──▶ canonical ──cut, pad──▶ this rank's part ──join──▶ the module's
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...backends.formats import Packed, Scheme
from ...backends.quantization import WeightFormat
from ..errors import ModelFormatError
from ..quantization import canonical
from .checkpoint import Checkpoint
from .shard import Span
from .tensors import Module, Take

_UNLIKE = "experts in formats of their own"


class PackedReader:
    """Reads layers as a scheme says that they are stored; plain ones as they are."""

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._scheme = scheme
        self._dtype = dtype
        self.dequantised: Counter[str] = Counter()
        """Weights that were packed, by the reason why they are no longer."""
        self.dequantised_bytes = 0
        """Memory that these take more than before."""

    def parts(self, module: Module, takes: Sequence[Take]) -> Sequence[Packed]:
        """Of some takes of a module. Raises ModelFormatError."""
        found: list[Packed] = []
        last: tuple[Take, Packed] | None = None
        for take in takes:
            if last is None or (last[0].layer, last[0].rows) != (take.layer, take.rows):
                last = take, self._enclosing(module, take)
            found.append(self._part(module, take, last[1]))
        return found

    def joined(self, parts: Sequence[Packed]) -> Packed | None:
        """One weight of several parts; None where their formats differ or only their format knows them."""
        if len(parts) == 1:
            return parts[0]
        if any(part.format.kind not in canonical.KINDS for part in parts):
            return None
        return canonical.join_rows(parts)

    def stacked(self, module: Module) -> Packed:
        """Of experts, [E, N, K]; plain where their formats differ or only their format knows them."""
        experts = []
        for takes in module.takes:
            parts = self.parts(module, takes)
            joined = self.joined(parts)
            if joined is None:
                weights = [self.dequantise(part, _UNLIKE).tensors["weight"] for part in parts]
                joined = _plain(torch.cat(weights, -2))
            experts.append(joined)
        try:
            return canonical.stack(experts)
        except ValueError:
            return canonical.stack([self.dequantise(expert, _UNLIKE) for expert in experts])

    def dequantise(self, packed: Packed, reason: str) -> Packed:
        """The same weight as plain numbers of the model's dtype; counted, if it was not plain."""
        if packed.format.kind == "plain":
            return _plain(packed.tensors["weight"].to(self._dtype))
        found = self._scheme.dequantise(packed)
        plain = _plain((canonical.dequantise(packed) if found is None else found).to(self._dtype))
        self.dequantised[reason] += 1
        self.dequantised_bytes += _num_bytes(plain) - _num_bytes(packed)
        return plain

    def _enclosing(self, module: Module, take: Take) -> Packed:
        """The least that can be packed of a layer and holds the rows and columns of a take."""
        layer, rows, columns = take.layer, take.rows, _columns(module)
        if not self._checkpoint.is_packed(layer):
            part = (slice(rows.start, rows.stop), slice(columns.start, columns.stop))
            return _plain(self._checkpoint.read(layer, "weight", *part))
        tensors = self._checkpoint.read_packed(layer, rows, columns)
        name = self._checkpoint.stored_as(layer)
        try:
            return self._scheme.pack(name, tensors)
        except ValueError as error:
            raise ModelFormatError(f"{name}: {error}; fetch the model anew") from error

    def _part(self, module: Module, take: Take, packed: Packed) -> Packed:
        rows, columns = take.rows, _columns(module)
        if not self._checkpoint.is_packed(take.layer):
            weight = packed.tensors["weight"]
            if take.picked is not None:
                weight = weight[list(take.picked)]
            out = torch.zeros(rows.size, columns.size, dtype=self._dtype)
            out[: weight.shape[0], : weight.shape[1]] = weight
            return _plain(out)
        down, across = self._checkpoint.enclosing(take.layer, rows, columns)
        if take.picked is None and _is_all(rows, down) and _is_all(columns, across):
            return packed
        rows, columns = _shifted(rows, down.start), _shifted(columns, across.start)
        try:
            return _cut(packed, rows, columns, take.picked)
        except ValueError as error:
            # what its kind cannot express, such as an odd number of int4, or a kind that only its format knows
            return _cut(self.dequantise(packed, str(error)), rows, columns, take.picked)


def _cut(packed: Packed, rows: Span, columns: Span, picked: tuple[int, ...] | None) -> Packed:
    """Spans of a weight, with numbers worth 0 behind them; of an empty span all numbers are such."""
    num_rows, num_columns = canonical.num_rows(packed), canonical.in_features(packed)
    if not rows.num_held:
        packed, picked = canonical.pad(packed, num_rows + rows.size, num_columns), None
        num_rows, rows = num_rows + rows.size, _behind(num_rows, rows)
    if not columns.num_held:
        packed = canonical.pad(packed, num_rows, num_columns + columns.size)
        columns = _behind(num_columns, columns)
    packed = canonical.cut(packed, slice(rows.start, rows.stop), slice(columns.start, columns.stop))
    if picked is not None:
        packed = canonical.take_rows(packed, torch.tensor(picked))
    return canonical.pad(packed, rows.size, columns.size)


def _num_bytes(packed: Packed) -> int:
    return sum(tensor.nbytes for tensor in packed.tensors.values())


def _is_all(span: Span, features: range) -> bool:
    return (span.start, span.stop, span.size) == (features.start, features.stop, len(features))


def _behind(first: int, span: Span) -> Span:
    return Span(start=first, stop=first + span.size, size=span.size)


def _shifted(span: Span, by: int) -> Span:
    return replace(span, start=span.start - by, stop=span.stop - by)


def _columns(module: Module) -> Span:
    assert module.columns is not None  # norms are never packed
    return module.columns


def _plain(weight: Tensor) -> Packed:
    return Packed(format=WeightFormat(), tensors={"weight": weight})
