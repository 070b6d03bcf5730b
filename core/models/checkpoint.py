"""A source's tensors, matched with the layers of a model before any of them is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import lcm
from typing import Literal

from torch import Tensor

from ...backends.formats import Axis, Scheme, StoredTensor
from ..errors import ModelFormatError
from ..loading.weight_source import Part, WeightSource
from .shard import Span
from .tensors import CheckpointLayout, Layer, Module, Shape

_PLAIN_DTYPES = ("float32", "bfloat16", "float16", "float64")


class Checkpoint:
    """`scheme` says which layers are packed; None: all are plain. Raises ModelFormatError for a tensor that is missing,
    unknown, there twice, or not of the shape or dtype that config.json and scheme ask for.
    """

    def __init__(
        self, source: WeightSource, layout: CheckpointLayout, scheme: Scheme | None = None
    ) -> None:
        self._source = source
        self._layout = layout
        self._format = "" if scheme is None else scheme.name
        self._names: dict[str, str] = {}
        """In the source, by canonical name."""
        self._modules: dict[str, str] = {}
        """The same of layers."""
        for name in source.names:
            self._add(layout.canonical(name), name)
        self._packed: dict[str, Mapping[str, StoredTensor]] = {}
        """What a layer is stored as, of those that are packed."""
        used: set[str] = set()
        for layer in layout.layers.values():
            stored = None if scheme is None else self._ask(scheme, layer)
            if stored is not None:
                self._packed[layer.name] = stored
            used.update(self._check(layer))
        self._check_unknown(used)
        self._check_missing()

    def is_packed(self, layer: Layer) -> bool:
        """Whether its weight is what the scheme packs."""
        return layer.name in self._packed

    def stored_as(self, layer: Layer) -> str:
        """A layer's name in the files."""
        return self._modules.get(layer.name, self._layout.names.prefix + layer.name)

    def num_bytes(self, module: Module) -> int:
        """In the files, of all layers that a module is made of, whole."""
        names = {
            name
            for takes in module.takes
            for take in takes
            for kind in self._kinds(take.layer)
            if (name := self._stored_name(take.layer, kind)) is not None
        }
        return sum(self._source.weights[self._names[name]].num_bytes for name in names)

    def read(self, layer: Layer, kind: str, rows: slice, columns: slice | None = None) -> Tensor:
        """Part of a plain tensor, perhaps a view of the file's pages. columns None: the tensor has none."""
        return self._read(layer, kind, (rows,) if columns is None else (rows, columns))

    def read_packed(self, layer: Layer, rows: Span, columns: Span) -> Mapping[str, Tensor]:
        """Whatever of a packed layer's tensors stands for the features of `enclosing`, in memory of its own."""
        down, across = self.enclosing(layer, rows, columns)
        return {
            kind: self._read(
                layer, kind, tuple(_entries(a, down, across) for a in stored.axes)
            ).clone()
            for kind, stored in self._packed[layer.name].items()
            if self._stored_name(layer, kind) is not None
        }

    def enclosing(self, layer: Layer, rows: Span, columns: Span) -> tuple[range, range]:
        """The fewest features of a packed layer that hold some of them and end where entries of all its tensors do."""
        stored = self._packed[layer.name]
        num_rows, num_columns = layer.shape
        return (
            _enclosing(rows, _unit(stored, "out"), num_rows),
            _enclosing(columns, _unit(stored, "in"), num_columns),
        )

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

    def _read(self, layer: Layer, kind: str, part: Part) -> Tensor:
        name = self._stored_name(layer, kind)
        assert name is not None  # or _check_missing would have said so
        if layer.stack is None or name != layer.stack.tensor:
            return self._source.read(self._names[name], part)
        first, expert = layer.stack.first_row, layer.stack.expert
        rows = slice(first + part[0].start, first + part[0].stop)
        return self._source.read(self._names[name], (slice(expert, expert + 1), rows, *part[1:]))[0]

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
        self._modules[canonical.rpartition(".")[0]] = name.rpartition(".")[0]

    def _ask(self, scheme: Scheme, layer: Layer) -> Mapping[str, StoredTensor] | None:
        """What stands for a layer; None where it is plain, be it that the files just hold it so."""
        if len(layer.shape) == 1:
            return None
        num_rows, num_columns = layer.shape
        stored = scheme.stored(self.stored_as(layer), num_columns, num_rows)
        plain = self._stored_name(layer, "weight")
        if stored is None or plain is None:
            return stored
        dtype = self._source.weights[self._names[plain]].dtype
        if layer.stays_plain and dtype in _PLAIN_DTYPES:
            return None
        others = [
            kind for kind in stored if kind != "weight" and f"{layer.name}.{kind}" in self._names
        ]
        is_meant = "weight" in stored and dtype in stored["weight"].dtypes
        return stored if is_meant or others or dtype not in _PLAIN_DTYPES else None

    def _kinds(self, layer: Layer) -> Iterator[str]:
        """The tensors that stand for a layer, and those that may."""
        yield from self._packed.get(layer.name, ("weight",))
        yield from layer.kinds[1:]

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
        for kind in self._kinds(layer):
            name = self._stored_name(layer, kind)
            if name is None:
                continue
            stored = self._packed.get(layer.name, {}).get(kind)
            dtypes = _PLAIN_DTYPES if stored is None else stored.dtypes
            shape: tuple[int | None, ...] = layer.tensor_shape(kind)
            if stored is not None:
                shape = _stored_shape(stored, layer.shape)
            if layer.stack is not None and layer.stack.tensor in self._names:
                if name != layer.stack.tensor:
                    raise _twice(self._names[name])
                shape = layer.stack.shape
            self._check_tensor(self._names[name], shape, dtypes)
            found.append(name)
        return found

    def _check_tensor(
        self, name: str, shape: tuple[int | None, ...], dtypes: tuple[str, ...]
    ) -> None:
        entry = self._source.weights[name]
        if not _fits(entry.shape, shape):
            wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
            raise ModelFormatError(
                f"{name} has the shape {list(entry.shape)} where config.json asks for {wanted}; fetch the model anew"
            )
        if entry.dtype not in dtypes:
            why = f"{self._format} has {' or '.join(dtypes)}; fetch the model anew"
            if dtypes is _PLAIN_DTYPES:
                why = f"{self._format or 'config.json'} names no quantization of it; fetch a plain checkpoint"
            raise ModelFormatError(f"{name} holds {entry.dtype}, and {why}")

    def _check_unknown(self, used: set[str]) -> None:
        known = used | self._layout.kv_scales.keys()
        for canonical, name in self._names.items():
            if canonical in known or self._layout.is_ignored(canonical):
                continue
            if not self._is_empty_bias(canonical):
                raise ModelFormatError(
                    f"the checkpoint holds {name}, for which its architecture has no place; fetch a checkpoint "
                    "that fits its config.json"
                )

    def _is_empty_bias(self, canonical: str) -> bool:
        """Some writers give every layer that they pack a bias, of zeros where the model has none."""
        layer, _, kind = canonical.rpartition(".")
        if kind != "bias" or layer not in self._packed:
            return False
        return not bool(self._source.read(self._names[canonical]).any())

    def _check_missing(self) -> None:
        missing = []
        for layer in self._layout.layers.values():
            stored = self._packed.get(layer.name, {})
            for kind in self._kinds(layer):
                is_optional = kind in stored and stored[kind].optional
                if not is_optional and self._stored_name(layer, kind) is None:
                    missing.append(f"{layer.name}.{kind}")
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ModelFormatError(
                f"the checkpoint holds no tensor {missing[0]}{more}; fetch the model anew"
            )


def _twice(name: str) -> ModelFormatError:
    return ModelFormatError(f"the checkpoint holds {name} twice; fetch the model anew")


def _unit(stored: Mapping[str, StoredTensor], of: Literal["out", "in"]) -> int:
    """Features that whole entries of all tensors stand for; an even number of inputs, for int4 comes in pairs."""
    return lcm(
        2 if of == "in" else 1,
        *(axis.features for tensor in stored.values() for axis in tensor.axes if axis.of == of),
    )


def _enclosing(span: Span, unit: int, total: int) -> range:
    """Of an empty span as many as it has, from the first on: nothing can be packed of nothing."""
    start, stop = (span.start, span.stop) if span.num_held else (0, span.size)
    return range(start // unit * unit, min(total, -(-stop // unit) * unit))


def _entries(axis: Axis, rows: range, columns: range) -> slice:
    if axis.of == "none":
        return slice(None)
    features = rows if axis.of == "out" else columns
    return slice(features.start // axis.features, -(-features.stop // axis.features))


def _stored_shape(stored: StoredTensor, shape: Shape) -> tuple[int | None, ...]:
    """None where any size will do."""
    sizes = {"out": shape[0], "in": shape[1]}
    return tuple(
        axis.size if axis.of == "none" else -(-sizes[axis.of] // axis.features)
        for axis in stored.axes
    )


def _fits(shape: Shape, wanted: tuple[int | None, ...]) -> bool:
    if not wanted:
        return shape in ((), (1,))
    return len(shape) == len(wanted) and all(
        size is None or size == found for found, size in zip(shape, wanted, strict=True)
    )
