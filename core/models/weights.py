"""A stream of checkpoint tensors, gathered into the tensors of the decoder's modules."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import ModelFormatError
from .tensors import CheckpointLayout, Piece

ModuleTensors: TypeAlias = Mapping[str, Tensor]
"""weight, bias, …: all tensors of one module, on the host, in the model's dtype."""


class WeightCollector:
    """Holds the tensors of modules that are not complete yet, and no others."""

    def __init__(self, layout: CheckpointLayout, dtype: torch.dtype) -> None:
        self._layout = layout
        self._dtype = dtype
        self._tensors: dict[str, Tensor] = {}
        self._unfilled = {target: prod(shape) for target, shape in layout.targets.items()}
        self._seen: set[str] = set()
        self._kinds: dict[str, list[str]] = {}
        for target in layout.targets:
            module, kind = target.rsplit(".", 1)
            self._kinds.setdefault(module, []).append(kind)

    def take(self, name: str, tensor: Tensor) -> tuple[str, ModuleTensors] | None:
        """Copy a tensor to its place; the module it completes, if it does.

        Raises ModelFormatError for one that is unknown, there twice, not of floating point or of the wrong shape, and
        MemoryError.
        """
        canonical = self._layout.canonical(name)
        piece = self._layout.pieces.get(canonical)
        if piece is None:
            if self._layout.is_ignored(canonical):
                return None
            raise ModelFormatError(
                f"the checkpoint holds {name}, for which its architecture has no place; fetch a checkpoint that "
                "fits its config.json"
            )
        self._check(name, canonical, tensor, piece)
        if piece.target not in self._tensors:
            self._tensors[piece.target] = self._allocate(piece.target)
        _fill(self._tensors[piece.target], tensor, piece)
        self._unfilled[piece.target] -= tensor.numel()
        module = piece.target.rsplit(".", 1)[0]
        targets = {kind: f"{module}.{kind}" for kind in self._kinds[module]}
        if any(self._unfilled[target] for target in targets.values()):
            return None
        return module, {kind: self._tensors.pop(target) for kind, target in targets.items()}

    def check_complete(self) -> None:
        """Raises ModelFormatError naming a tensor that the checkpoint did not hold."""
        missing = {target for target, unfilled in self._unfilled.items() if unfilled}
        names = [
            name
            for name, piece in self._layout.pieces.items()
            if piece.target in missing and name not in self._seen
        ]
        if names:
            more = f" (and {len(missing) - 1} more are not complete)" if len(missing) > 1 else ""
            raise ModelFormatError(
                f"the checkpoint holds no tensor {names[0]}{more}; fetch the model anew"
            )

    def _allocate(self, target: str) -> Tensor:
        try:
            return torch.empty(self._layout.targets[target], dtype=self._dtype)
        except RuntimeError as error:  # what torch raises where Python has MemoryError
            raise MemoryError(f"no memory for {target}: {error}") from error

    def _check(self, name: str, canonical: str, tensor: Tensor, piece: Piece) -> None:
        if tuple(tensor.shape) != piece.shape:
            raise ModelFormatError(
                f"{name} has the shape {list(tensor.shape)} where config.json asks for {list(piece.shape)}; "
                "fetch the model anew"
            )
        if not tensor.is_floating_point():
            raise ModelFormatError(
                f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, and config.json names no quantization; "
                "fetch a plain checkpoint"
            )
        if canonical in self._seen or self._unfilled[piece.target] < tensor.numel():
            raise ModelFormatError(f"the checkpoint holds {name} twice; fetch the model anew")
        self._seen.add(canonical)


def _fill(target: Tensor, tensor: Tensor, piece: Piece) -> None:
    """Copy and cast. Interleaved heads: rows (head, 3, D) become (3, head, D)."""
    if piece.interleaved_heads:
        heads, rest = piece.interleaved_heads, tensor.shape[1:]
        by_head = tensor.reshape(heads, 3, tensor.shape[0] // (3 * heads), *rest)
        tensor = by_head.transpose(0, 1).reshape(tensor.shape)
    place = target if piece.expert is None else target[piece.expert]
    place.narrow(0, piece.first_row, tensor.shape[0]).copy_(tensor)
