"""Which numbers of a weight share a scale: rows and columns of one cell of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from ...backends.quantization import WeightFormat


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells of `rows` x `columns`; those at the end may be smaller."""

    rows: int
    columns: int

    @classmethod
    def of(cls, weight: WeightFormat, num_columns: int) -> Grid:
        """What the fields of a format say."""
        return cls(*(weight.block or (1, weight.group_size or num_columns)))

    def put(self, weight: WeightFormat, num_columns: int) -> WeightFormat:
        """The format with the fields that say this grid."""
        if self.rows > 1 or (self.columns < num_columns and num_columns % self.columns):
            return replace(weight, group_size=None, block=(self.rows, self.columns))
        group_size = self.columns if self.columns < num_columns else None
        return replace(weight, group_size=group_size, block=None)

    def shape(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Of the scales."""
        return -(-num_rows // self.rows), -(-num_columns // self.columns)

    def within(self, rows: range, columns: range) -> Grid:
        """The coarsest grid for a part of the weight: none of its cells lies in two of this one's."""
        return Grid(_within(self.rows, rows), _within(self.columns, columns))

    def evened(self, num_columns: int) -> Grid:
        """Such that all cells have as many columns."""
        if self.columns >= num_columns:
            return self
        return Grid(self.rows, gcd(self.columns, num_columns))

    def select(self, values: Tensor, finer: Grid, rows: range, columns: range) -> Tensor:
        """One value for each cell of a finer grid over a part of the weight, from one for each cell of this."""
        down = torch.arange(rows.start, rows.stop, finer.rows) // self.rows
        across = torch.arange(columns.start, columns.stop, finer.columns) // self.columns
        return values.index_select(-2, down).index_select(-1, across)


def common(grids: Sequence[Grid]) -> Grid:
    """The coarsest grid that is finer than all of them, where all begin at one corner."""
    return Grid(gcd(*(grid.rows for grid in grids)), gcd(*(grid.columns for grid in grids)))


def _within(size: int, part: range) -> int:
    if part.start // size == (part.stop - 1) // size:
        return size
    return gcd(size, part.start)
