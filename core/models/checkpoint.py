"""A source's tensors, matched with the layers of a model before any of them is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ModelFormatError
from ..loading.weight_source import WeightSource
from .tensors import CheckpointLayout, Layer, Module, Shape

_PLAIN_DTYPES = ("float32", "bfloat16", "float16", "float64")


class Checkpoint:
    """Raises ModelFormatError for a tensor that is missing, unknown, there twice, of the wrong shape or not of floating
    point.
    """

    def __init__(self, source: WeightSource, layout: CheckpointLayout) -> None:
        self._source = source
        self._layout = layout
        self._names: dict[str, str] = {}
        for name in source.names:
            self._add(layout.canonical(name), name)
        used = {name for layer in layout.layers.values() for name in self._check(layer)}
        self._check_unknown(used)
        self._check_missing()

    def num_bytes(self, module: Module) -> int:
        """In the files, of all layers that a module is made of, whole."""
        names = {
            name
            for takes in module.takes
            for take in takes
            for kind in take.layer.kinds
            if (name := self._stored_name(take.layer, kind)) is not None
        }
        return sum(self._source.weights[self._names[name]].num_bytes for name in names)

    def read(self, layer: Layer, kind: str, rows: slice, columns: slice | None) -> Tensor:
        """Part of a plain tensor, perhaps a view of the file's pages. columns None: the tensor has none."""
        name = self._stored_name(layer, kind)
        assert name is not None  # or _check_missing would have said so
        axes = (rows,) if columns is None else (rows, columns)
        if layer.stack is None or name != layer.stack.tensor:
            return self._source.read(self._names[name], axes)
        first, expert = layer.stack.first_row, layer.stack.expert
        rows = slice(first + rows.start, first + rows.stop)
        part = (slice(expert, expert + 1), rows, *axes[1:])
        return self._source.read(self._names[name], part)[0]

    def kv_scales(self) -> Mapping[str, float]:
        """Of a quantised cache, by the decoder's names; {} where the checkpoint has none."""
        found: dict[str, float] = {}
        for canonical, target in self._layout.kv_scales.items():
            name = self._names.get(canonical)
            if name is None:
                continue
            if target in found:
                raise _twice(name)
            found[target] = self._scalar(name)
        return found

    def _scalar(self, name: str) -> float:
        entry = self._source.weights[name]
        if entry.dtype not in _PLAIN_DTYPES or entry.shape not in ((), (1,)):
            raise ModelFormatError(
                f"{name} is {entry.dtype} {list(entry.shape)} and must be one float; fetch the model anew"
            )
        value = self._source.read(name).reshape(()).item()
        if not 0 < value < float("inf"):
            raise ModelFormatError(
                f"{name} is {value} and must be a finite number above 0; fetch the model anew"
            )
        return value

    def _add(self, canonical: str, name: str) -> None:
        if canonical in self._names:
            raise _twice(name)
        self._names[canonical] = name

    def _stored_name(self, layer: Layer, kind: str) -> str | None:
        """Canonical; None where the checkpoint does not hold it."""
        name = f"{layer.name}.{kind}"
        if name in self._names:
            return name
        if layer.stack is not None and kind == "weight" and layer.stack.tensor in self._names:
            return layer.stack.tensor
        return None

    def _check(self, layer: Layer) -> list[str]:
        """Canonical names of what is stored of a layer."""
        found = []
        for kind in layer.kinds:
            name = self._stored_name(layer, kind)
            if name is None:
                continue
            shape = layer.tensor_shape(kind)
            if layer.stack is not None and name == layer.stack.tensor:
                shape = layer.stack.shape
            elif layer.stack is not None and layer.stack.tensor in self._names:
                raise _twice(self._names[name])
            self._check_plain(self._names[name], shape)
            found.append(name)
        return found

    def _check_plain(self, name: str, shape: Shape) -> None:
        entry = self._source.weights[name]
        if entry.shape != shape:
            raise ModelFormatError(
                f"{name} has the shape {list(entry.shape)} where config.json asks for {list(shape)}; "
                "fetch the model anew"
            )
        if entry.dtype not in _PLAIN_DTYPES:
            raise ModelFormatError(
                f"{name} holds {entry.dtype}, and config.json names no quantization; fetch a plain checkpoint"
            )

    def _check_unknown(self, used: set[str]) -> None:
        known = used | self._layout.kv_scales.keys()
        for canonical, name in self._names.items():
            if canonical not in known and not self._layout.is_ignored(canonical):
                raise ModelFormatError(
                    f"the checkpoint holds {name}, for which its architecture has no place; fetch a checkpoint "
                    "that fits its config.json"
                )

    def _check_missing(self) -> None:
        missing = [
            f"{layer.name}.{kind}"
            for layer in self._layout.layers.values()
            for kind in layer.kinds
            if self._stored_name(layer, kind) is None
        ]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ModelFormatError(
                f"the checkpoint holds no tensor {missing[0]}{more}; fetch the model anew"
            )


def _twice(name: str) -> ModelFormatError:
    return ModelFormatError(f"the checkpoint holds {name} twice; fetch the model anew")


def allocate(what: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Raises MemoryError."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:  # what torch raises where Python has MemoryError
        raise MemoryError(f"no memory for {what}: {error}") from error
