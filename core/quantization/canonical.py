"""What can be done with canonical packed weights, all of it exact: no number of the weight changes.

The words are those of WeightFormat. Experts, with a leading [E], work like a single weight. A kind that a plugin brings
is a ValueError everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import gcd
from typing import Literal

import torch
from torch import Tensor

from ...backends.formats import Packed
from .grid import Grid, common
from .numbers import split_numbers, take_columns
from .permuted import PIECE, columns_of, lay_out, num_features

KINDS = ("plain", "int4", "int8", "fp8")
_ZERO_POINTS = ("none", "whole", "real")
"""Each can say what those before it say."""


def num_rows(packed: Packed) -> int:
    """N"""
    return _weight(packed).shape[-2]


def in_features(packed: Packed) -> int:
    """Inputs of the layer; a permuted weight may have more columns."""
    if not packed.format.permuted:
        return _num_columns(packed)
    order = packed.tensors["order"]
    return num_features(order if order.dim() == 1 else order[0])


def dequantise(packed: Packed) -> Tensor:
    """float32 [N, in_features]."""
    form = packed.format
    weight = split_numbers(form.kind, _weight(packed)).float()
    if form.kind == "plain":
        return weight
    rows, columns = range(weight.shape[-2]), range(weight.shape[-1])
    grid = Grid.of(form, len(columns))
    each = {
        name: grid.select(packed.tensors[name], Grid(1, 1), rows, columns)
        for name in _on_grid(packed)
    }
    # in place, for this is as large as the weight of a plain model
    weight.sub_(each.get("zero_point", _middle(packed))).mul_(each["scale"])
    if not form.permuted:
        return weight
    # the gaps go into one column more than there are inputs
    order = packed.tensors["order"].long().unsqueeze(-2).expand(weight.shape)
    out = weight.new_empty(*weight.shape[:-1], in_features(packed) + 1)
    return out.scatter_(-1, order, weight)[..., :-1]


def cut(packed: Packed, rows: slice, columns: slice) -> Packed:
    """Rows and inputs of a weight, in memory of their own; a group or block that is cut gets smaller.

    A permuted weight keeps the columns of these inputs, and its groups are filled up to one size. Raises ValueError
    for an odd number of inputs of int4.
    """
    down, across = range(num_rows(packed))[rows], range(in_features(packed))[columns]
    if len(down) == num_rows(packed) and len(across) == in_features(packed):
        return packed
    if not down or not across:
        raise ValueError("an empty part of a weight")
    if not packed.format.permuted:
        return _own(_take(packed, down, across))
    part = _own(_take(packed, down, range(_num_columns(packed))))
    if len(across) == in_features(packed):
        return part
    return _by_expert(
        part, lambda one: lay_out(columns_of(one).keep(across), one.format, len(across))
    )


def pad(packed: Packed, num_rows: int, in_features: int) -> Packed:
    """As large as that by numbers worth 0, behind the others. Raises ValueError for an odd number of inputs of int4."""
    if packed.format.permuted:
        packed = _by_expert(packed, lambda one: _add_inputs(one, in_features))
        return _fill(packed, num_rows, _num_columns(packed))
    return _fill(packed, num_rows, in_features)


def take_rows(packed: Packed, index: Tensor) -> Packed:
    """The rows of `index` i64 [n], in its order."""
    form, num_columns = packed.format, _num_columns(packed)
    grid = Grid.of(form, num_columns)
    tensors = dict(packed.tensors, weight=_weight(packed).index_select(-2, index))
    for name in _on_grid(packed):
        tensors[name] = packed.tensors[name].index_select(-2, index // grid.rows)
    return Packed(format=replace(grid, rows=1).put(form, num_columns), tensors=tensors)


def join_rows(parts: Sequence[Packed]) -> Packed | None:
    """One below the other; None where their formats, or the orders of their columns, cannot be made one.

    Of several input scales the largest is taken: no input is clipped that was not.
    """
    corners = [num_rows(part) for part in parts[:-1]]
    orders = [part.tensors["order"] for part in parts if part.format.permuted]
    if any(not torch.equal(order, orders[0]) for order in orders):
        return None
    alike = _alike(parts, gcd(*corners))
    if alike is None:
        return None
    first = alike[0]
    tensors = dict(first.tensors)
    for name in ("weight", *_on_grid(first)):
        tensors[name] = torch.cat([part.tensors[name] for part in alike], -2)
    if "input_scale" in tensors:
        tensors["input_scale"] = torch.stack([p.tensors["input_scale"] for p in alike]).amax(0)
    return Packed(format=first.format, tensors=tensors)


def stack(parts: Sequence[Packed]) -> Packed:
    """Experts, one after the other. Raises ValueError where their formats cannot be made one."""
    alike = _alike(_as_wide(parts), 0)
    if alike is None:
        kinds = ", ".join(sorted({part.format.kind for part in parts}))
        raise ValueError(f"experts of different formats ({kinds})")
    return _stack(alike)


def _weight(packed: Packed) -> Tensor:
    if packed.format.kind not in KINDS:
        raise ValueError(f"weights of kind {packed.format.kind}, which only its format knows")
    return packed.tensors["weight"]


def _num_columns(packed: Packed) -> int:
    return _weight(packed).shape[-1] * (2 if packed.format.kind == "int4" else 1)


def _on_grid(packed: Packed) -> Sequence[str]:
    return [name for name in ("scale", "zero_point") if name in packed.tensors]


def _middle(packed: Packed) -> int:
    """The number that is worth 0 where there are no zero points."""
    return 8 if packed.format.kind == "int4" else 0


def _own(packed: Packed) -> Packed:
    """Tensors that do not keep the whole alive of which they are a part."""
    own = {
        name: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t
        for name, t in packed.tensors.items()
    }
    return replace(packed, tensors=own)


def _take(packed: Packed, rows: range, columns: range) -> Packed:
    """Columns as they lie in memory."""
    form = packed.format
    grid = Grid.of(form, _num_columns(packed))
    finer = grid.within(rows, columns)
    if form.block is None:
        finer = finer.evened(len(columns))
    below = _weight(packed)[..., rows.start : rows.stop, :]
    tensors = dict(packed.tensors, weight=take_columns(form.kind, below, columns))
    for name in _on_grid(packed):
        tensors[name] = grid.select(packed.tensors[name], finer, rows, columns)
    return Packed(format=finer.put(form, len(columns)), tensors=tensors)


def _fill(packed: Packed, wanted_rows: int, wanted_columns: int) -> Packed:
    """Columns as they lie in memory."""
    rows, columns = range(num_rows(packed)), range(_num_columns(packed))
    if (wanted_rows, wanted_columns) == (len(rows), len(columns)):
        return packed
    form, grid = packed.format, Grid.of(packed.format, len(columns))
    finer, number = grid, _middle(packed)
    if form.zero_points != "none":
        # what is added gets cells of its own, for those that are there may have no number worth 0
        finer, number = Grid(gcd(grid.rows, len(rows)), gcd(grid.columns, len(columns))), 0
    elif form.block is None and form.group_size is None:
        finer = Grid(1, wanted_columns)
    if form.block is None:
        finer = finer.evened(wanted_columns)
    below, behind = wanted_rows - len(rows), wanted_columns - len(columns)
    if form.kind == "int4":
        if behind % 2:
            raise ValueError(f"{wanted_columns} columns of int4; there must be an even number")
        number, behind = number * 17, behind // 2
    tensors = dict(packed.tensors)
    tensors["weight"] = _append(_weight(packed), below, behind, number)
    size = finer.shape(wanted_rows, wanted_columns)
    for name, value in (("scale", 1), ("zero_point", 0)):
        if name in tensors:
            values = grid.select(tensors[name], finer, rows, columns)
            more = size[0] - values.shape[-2], size[1] - values.shape[-1]
            tensors[name] = _append(values, *more, value)
    return Packed(format=finer.put(form, wanted_columns), tensors=tensors)


def _append(values: Tensor, below: int, behind: int, number: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, behind, 0, below), value=number)


def _add_inputs(packed: Packed, wanted: int) -> Packed:
    there = in_features(packed)
    if there == wanted:
        return packed
    number = _middle(packed) if packed.format.zero_points == "none" else 0
    columns = columns_of(packed).add(range(there, wanted), number)
    return lay_out(columns, packed.format, wanted, size=packed.format.group_size or PIECE)


def _as_wide(parts: Sequence[Packed]) -> Sequence[Packed]:
    """Permuted ones with as many columns and groups of one size."""
    layouts = {(part.format.group_size, _num_columns(part)) for part in parts}
    if len(layouts) == 1 or not all(part.format.permuted for part in parts):
        return parts

    def small(part: Packed, least: int) -> Packed:
        columns = columns_of(part)
        return lay_out(columns, part.format, in_features(part), size=PIECE, min_columns=least)

    widest = max(_num_columns(small(part, 0)) for part in parts)
    return [small(part, widest) for part in parts]


def _alike(parts: Sequence[Packed], corner: int) -> Sequence[Packed] | None:
    """All of one format. `corner`: rows that no cell may cross, counted from a multiple of it."""
    formats = [part.format for part in parts]
    if len({(f.kind, f.permuted, f.activation) for f in formats}) > 1:
        return None
    if formats[0].kind == "plain":
        dtype = torch.float32
        if len({_weight(part).dtype for part in parts}) == 1:
            return parts
        return [replace(part, tensors={"weight": _weight(part).to(dtype)}) for part in parts]
    zero_points = max((f.zero_points for f in formats), key=_ZERO_POINTS.index)
    num_columns = _num_columns(parts[0])
    grid = common([Grid.of(f, num_columns) for f in formats])
    grid = replace(grid, rows=gcd(grid.rows, corner))
    return [_refine(part, grid, zero_points) for part in parts]


def _refine(packed: Packed, finer: Grid, zero_points: Literal["none", "whole", "real"]) -> Packed:
    """The same weight with scales of a finer grid."""
    rows, columns = range(num_rows(packed)), range(_num_columns(packed))
    grid = Grid.of(packed.format, len(columns))
    tensors = dict(packed.tensors)
    for name in _on_grid(packed):
        tensors[name] = grid.select(tensors[name], finer, rows, columns)
    if zero_points != "none" and "zero_point" not in tensors:
        tensors["zero_point"] = torch.full_like(tensors["scale"], _middle(packed))
    form = replace(finer.put(packed.format, len(columns)), zero_points=zero_points)
    return Packed(format=form, tensors=tensors)


def _by_expert(packed: Packed, change: Callable[[Packed], Packed]) -> Packed:
    if _weight(packed).dim() == 2:
        return change(packed)
    experts = [
        replace(packed, tensors={name: t[expert] for name, t in packed.tensors.items()})
        for expert in range(len(_weight(packed)))
    ]
    return _stack(_as_wide([change(expert) for expert in experts]))


def _stack(alike: Sequence[Packed]) -> Packed:
    first = alike[0]
    tensors = {n: torch.stack([part.tensors[n] for part in alike]) for n in first.tensors}
    return Packed(format=first.format, tensors=tensors)
