"""What the tensors of a quantised layer may not hold. Errors are ValueErrors that begin with the tensor's name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def stored(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Of a layer, one that must be there."""
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    return tensors[name]


def check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...], because: str) -> Tensor:
    """The tensor, if it has that shape. `because` says what asks for it."""
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"{name} has the shape {list(tensor.shape)} where {because} asks for {list(wanted)}"
        )
    return tensor


def finite(name: str, tensor: Tensor) -> Tensor:
    """As float32, if no number is nan or infinite."""
    numbers = tensor.float()
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} holds nan or infinity")
    return numbers
