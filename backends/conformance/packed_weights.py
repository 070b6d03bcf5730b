"""Packed weights made up for the kit, and what their numbers are worth, read off bit by bit in float64.

Written without torch's conversions and without the references, so that a mistake of theirs is not repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..quantization import WeightFormat

F64 = NDArray[np.float64]
TYPICAL = {"int4": 5.0, "int8": 70.0, "fp8": 90.0}
"""About the size of a number, before it is scaled."""
FP8_MOST = 448.0
"""The largest float8_e4m3fn."""


QUICK: tuple[WeightFormat, ...] = (
    WeightFormat(kind="int4", group_size=32),
    WeightFormat(kind="int4", group_size=64, zero_points="whole"),
    WeightFormat(kind="int4", group_size=32, zero_points="real", permuted=True),
    WeightFormat(kind="int4", zero_points="whole"),
    WeightFormat(kind="int8", activation="dynamic_token"),
    WeightFormat(kind="int8", group_size=32, zero_points="whole", permuted=True),
    WeightFormat(kind="fp8"),
    WeightFormat(kind="fp8", block=(48, 96)),
)
"""What the quick selection looks at."""
FORMATS: tuple[WeightFormat, ...] = (
    *QUICK,
    WeightFormat(kind="int4", group_size=64),
    WeightFormat(kind="int4", group_size=128, zero_points="whole"),
    WeightFormat(kind="int4", group_size=32, zero_points="whole", permuted=True),
    WeightFormat(kind="int4", group_size=16, zero_points="real"),
    WeightFormat(kind="int8"),
    WeightFormat(kind="int8", group_size=64),
    WeightFormat(kind="int8", zero_points="real"),
    WeightFormat(kind="int8", activation="static_tensor"),
    WeightFormat(kind="fp8", group_size=32),
    WeightFormat(kind="fp8", block=(128, 128), activation="dynamic_token"),
    WeightFormat(kind="fp8", activation="dynamic_token"),
    WeightFormat(kind="fp8", activation="static_tensor"),
)
"""Kinds, groups, blocks, zero points, orders and inputs, in the combinations that checkpoints have, and some more."""


def format_name(form: WeightFormat) -> str:
    """ "int4 groups of 32, whole zero points"."""
    scales = "rows" if form.group_size is None else f"groups of {form.group_size}"
    if form.block is not None:
        scales = f"blocks of {form.block[0]} x {form.block[1]}"
    rest = [f"{form.zero_points} zero points"] * (form.zero_points != "none")
    rest += ["permuted"] * form.permuted + [form.activation] * (form.activation != "none")
    return ", ".join((f"{form.kind} {scales}", *rest))


def make_packed(
    form: WeightFormat, num_rows: int, in_features: int, *, seed: int = 0, largest_input: float = 0
) -> dict[str, Tensor]:
    """Canonical tensors of a weight [num_rows, in_features], such that outputs are of order 1.

    Among random rows one holds the same number throughout, one the least and the largest there is, one of fp8 the
    subnormal ones, and one scale of several is 0. A permuted one has a group more than in_features needs, whose columns
    multiply nothing.
    """
    draw = np.random.default_rng(seed)
    num_columns = in_features + (form.group_size or 0) * form.permuted
    codes = _codes(form.kind, draw, (num_rows, num_columns))
    tensors = {"weight": _stored(form.kind, codes)}
    shape = _scale_shape(form, num_rows, num_columns)
    scale = draw.uniform(0.5, 1.5, shape) * in_features**-0.5 / TYPICAL[form.kind]
    if scale.size > 1:
        scale[-1, -1] = 0
    tensors["scale"] = torch.from_numpy(scale.astype(np.float32))
    if form.zero_points != "none":
        middle = 8 if form.kind == "int4" else 0
        zero = middle + draw.uniform(-3, 3, shape)
        zero.flat[:2] = (0, 15)
        zero = np.round(zero) if form.zero_points == "whole" else zero
        tensors["zero_point"] = torch.from_numpy(zero.astype(np.float32))
    if form.permuted:
        order = draw.permutation(num_columns).clip(max=in_features)
        tensors["order"] = torch.from_numpy(order.astype(np.int32))
    if form.activation == "static_tensor":
        most = 127.0 if form.kind == "int8" else FP8_MOST
        tensors["input_scale"] = torch.tensor(largest_input / most, dtype=torch.float32)
    return tensors


def worth(form: WeightFormat, tensors: Mapping[str, Tensor], in_features: int) -> F64:
    """float64 [N, in_features]: what each input is multiplied by."""
    numbers = _decoded(form.kind, tensors["weight"])
    row, column = np.indices(numbers.shape)
    if form.block is not None:
        place = (row // form.block[0], column // form.block[1])
    else:
        place = (row, column // (form.group_size or numbers.shape[1]))
    zero = np.float64(8 if form.kind == "int4" else 0)
    if "zero_point" in tensors:
        zero = tensors["zero_point"].double().numpy()[place]
    values = (numbers - zero) * tensors["scale"].double().numpy()[place]
    found = np.zeros((len(values), in_features + 1))
    order = tensors["order"].numpy() if "order" in tensors else np.arange(values.shape[1])
    found[:, order] = values  # whatever lands in the last column multiplies 0
    return found[:, :in_features]


def input_slack(form: WeightFormat, x: F64, weight: F64) -> F64:
    """[T, N]: how far outputs may be off because the format lets a kernel round x [T, K] to the weight's kind.

    int8: numbers are multiples of a scale s, so none is off by more than s / 2; s is the largest of its token (of all
    tokens where the scale is given, and nothing is cut off) over 127.  fp8: a number has 3 bits of mantissa, so it is
    off by a 16th of itself at most, or by half the least step, 2**-9, of a scale that takes the largest to 240 or more.
    An output is off by the sum of these, each times the weight's size: a bound, not an estimate. A 64th more, for
    scales are rounded too.
    """
    if form.activation == "none":
        return np.zeros((len(x), len(weight)))
    largest = np.abs(x).max(axis=1 if form.activation == "dynamic_token" else None, keepdims=True)
    if form.kind == "int8":
        off = np.broadcast_to(largest / 254, x.shape)
    else:
        off = np.maximum(np.abs(x) / 16, largest / 240 * 2.0**-10)
    slack: F64 = off @ np.abs(weight).T * (1 + 1 / 64)
    return slack


def _codes(kind: str, draw: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Bit patterns as numbers: 0 to 15, or 0 to 255."""
    if kind == "fp8":
        codes = draw.integers(0x48, 0x78, shape) | draw.integers(0, 2, shape) << 7
        codes[:, ::7] = draw.integers(
            0, 0x48, codes[:, ::7].shape
        )  # small ones, subnormal ones and 0
        extremes = (0x7E, 0xFE)
    elif kind == "int8":
        codes, extremes = draw.integers(0, 256, shape), (0x7F, 0x80)
    else:
        codes, extremes = draw.integers(0, 16, shape), (0, 15)
    codes[0] = codes[0, 0]
    codes[1, 0::2], codes[1, 1::2] = extremes
    return codes


def _stored(kind: str, codes: NDArray[np.int64]) -> Tensor:
    if kind == "int4":
        return torch.from_numpy((codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8))
    stored = torch.from_numpy(codes.astype(np.uint8))
    return stored.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn)


def _scale_shape(form: WeightFormat, num_rows: int, num_columns: int) -> tuple[int, int]:
    if form.block is not None:
        return -(-num_rows // form.block[0]), -(-num_columns // form.block[1])
    return num_rows, num_columns // (form.group_size or num_columns)


def _decoded(kind: str, weight: Tensor) -> F64:
    """[N, K] from the bits."""
    bits = weight.view(torch.uint8).numpy().astype(np.int64)
    if kind == "int4":
        both = np.zeros((bits.shape[0], bits.shape[1] * 2))
        both[:, 0::2], both[:, 1::2] = bits % 16, bits // 16
        return both
    if kind == "int8":
        return (bits - 256 * (bits > 127)).astype(np.float64)
    exponent, mantissa = bits // 8 % 16, bits % 8
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    found: F64 = np.where(bits > 127, -size, size)
    return found
