"""Columns in an order of their own (GPTQ's desc_act), laid out so that each group has the same number of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...backends.formats import Packed
from ...backends.quantization import WeightFormat
from .numbers import join_numbers, split_numbers

PIECE = 32
"""Columns of a piece where groups have different sizes: kernels take so few, and a group loses half of one."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Of a permuted weight, in any order and without gaps."""

    numbers: Tensor
    """[N, k]"""
    features: Tensor
    """i64 [k], the input that each multiplies."""
    groups: Tensor
    """i64 [k]"""
    values: Mapping[str, Tensor]
    """scale, and zero_point where there is one: f32 [N, G]"""
    rest: Mapping[str, Tensor]
    """Tensors of the weight that have nothing to do with its columns."""

    def keep(self, features: range) -> Columns:
        """Those of these inputs, which are counted from the first of them."""
        kept = (self.features >= features.start) & (self.features < features.stop)
        return Columns(
            numbers=self.numbers[:, kept],
            features=self.features[kept] - features.start,
            groups=self.groups[kept],
            values=self.values,
            rest=self.rest,
        )

    def add(self, features: range, number: int) -> Columns:
        """And those of these inputs, which all are `number` and have a group to themselves."""
        group = int(self.groups.max()) + 1
        fill = {"scale": 1.0, "zero_point": 0.0}
        return Columns(
            numbers=torch.nn.functional.pad(self.numbers, (0, len(features)), value=number),
            features=torch.cat((self.features, torch.arange(features.start, features.stop))),
            groups=torch.nn.functional.pad(self.groups, (0, len(features)), value=group),
            values={
                name: torch.nn.functional.pad(value[:, :group], (0, 1), value=fill[name])
                for name, value in self.values.items()
            },
            rest=self.rest,
        )


def columns_of(packed: Packed) -> Columns:
    """Of one permuted weight."""
    order = packed.tensors["order"].long()
    size = packed.format.group_size or len(order)
    real = order < num_features(order)
    return Columns(
        numbers=split_numbers(packed.format.kind, packed.tensors["weight"])[:, real],
        features=order[real],
        groups=(torch.arange(len(order)) // size)[real],
        values={n: t for n, t in packed.tensors.items() if n in ("scale", "zero_point")},
        rest={n: t for n, t in packed.tensors.items() if n == "input_scale"},
    )


def lay_out(
    columns: Columns,
    form: WeightFormat,
    num_features: int,
    *,
    size: int | None = None,
    min_columns: int = 0,
) -> Packed:
    """A weight whose groups are pieces of `size` columns; without it, of all of a group where all have as many."""
    source, groups, size = _places(columns.groups, size, min_columns)
    # what lies in a gap does not matter, for it is multiplied by 0
    index = source.clamp(min=0)
    order = torch.where(source < 0, num_features, columns.features.index_select(0, index))
    tensors = {name: value.index_select(1, groups) for name, value in columns.values.items()}
    numbers = columns.numbers.index_select(1, index)
    tensors |= {"weight": join_numbers(form.kind, numbers), "order": order.to(torch.int32)}
    group_size = size if len(groups) > 1 else None
    return Packed(
        format=replace(form, group_size=group_size, permuted=True),
        tensors={**columns.rest, **tensors},
    )


def num_features(order: Tensor) -> int:
    """in_features, from order [K].

    A gap holds it, and there is never one gap alone: without gaps each number below K occurs once, with them the
    largest occurs more than once.
    """
    last = int(order.max())
    return last if int((order == last).sum()) > 1 else last + 1


def _places(groups: Tensor, size: int | None, min_columns: int) -> tuple[Tensor, Tensor, int]:
    """Which column lies where [K], -1 for none; the group of each piece [K / size]; the size."""
    ids, counts = torch.unique(groups, return_counts=True)
    if size is None:
        largest = int(counts.max())
        is_even = bool((counts == largest).all()) and largest % 2 == 0
        size = largest if is_even else min(PIECE, largest + largest % 2)
    pieces = -(-counts // size)
    num_columns = max(int(pieces.sum()) * size, min_columns)
    if num_columns - len(groups) == 1:
        num_columns += size  # for a gap alone could not be told from a column
    pieces[-1] += num_columns // size - pieces.sum()
    source = torch.full((num_columns,), -1)
    shift = (torch.cumsum(pieces, 0) - pieces) * size - (torch.cumsum(counts, 0) - counts)
    by_group = torch.argsort(groups, stable=True)
    source[torch.arange(len(groups)) + torch.repeat_interleave(shift, counts)] = by_group
    return source, torch.repeat_interleave(ids, pieces), size
