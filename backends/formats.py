"""Formats of quantised checkpoints: how a layer's weight is stored in files, and how it becomes canonical.

The core knows some; a plugin may bring others by the hook quantization_formats. All of them work in the same way:

    config.json's quantization_config ──read──▶ Scheme ──stored──▶ which tensors, and how they may be cut
                                                       ──pack────▶ WeightFormat and its canonical tensors
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from .quantization import WeightFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One axis of a stored tensor: what its entries stand for."""

    of: Literal["out", "in", "none"]
    """Features of the layer along which a rank's part may be cut out; "none": every rank reads all of it."""
    features: int = 1
    """That one entry stands for: 8 where eight numbers lie in an int32, 128 where 128 share a scale."""
    size: int | None = None
    """Entries of an axis of "none", where that is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor of a layer in the files."""

    dtypes: tuple[str, ...]
    """By torch's names; others are refused."""
    axes: tuple[Axis, ...]
    """() and (1,) are both one number for the whole layer."""
    optional: bool = False
    """The files may leave it out."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight in canonical form."""

    format: WeightFormat
    """What the tensors are."""
    tensors: Mapping[str, Tensor]
    """See WeightFormat; none that it does not name."""


class Scheme(ABC):
    """One checkpoint's, or for a format made while loading one model's, way to store the weights of linear layers."""

    name: str
    """The format's."""

    @abstractmethod
    def stored(
        self, module: str, in_features: int, out_features: int
    ) -> Mapping[str, StoredTensor] | None:
        """What stands for `module`, a layer by its name in the files, by the last part of each tensor's name.

        in_features, out_features: of the whole layer. None where it is stored as plain "weight".
        """

    @abstractmethod
    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:
        """From tensors on the host, by the names that `stored` gives, to canonical ones.

        They may be parts of the whole layer, cut at entries along the axes of "out" and "in". Raises ValueError saying
        which tensor holds what it may not; the core adds the layer's name.
        """

    def dequantise(self, packed: Packed) -> Tensor | None:  # noqa: ARG002
        """float32 [N, in_features] of a kind that the format brings itself; None for those of WeightFormat's table."""
        return None


class CheckpointFormat(ABC):
    """A format by its name. Importing its module imports no torch."""

    name: str
    """As --quantize takes it and quant_method in config.json says it."""

    @abstractmethod
    def read(self, config: Mapping[str, object] | None) -> Scheme:
        """`config`: quantization_config of config.json, or None where --quantize asks for a plain checkpoint to be
        quantised while it is loaded. Raises Incompatible naming what is not served, with the choices and the cure.
        """
