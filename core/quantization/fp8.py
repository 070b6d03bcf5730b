"""fp8 (e4m3fn) with a scale for each layer, for each of its rows, or for blocks of them. Stored as one of:

    quant_method fp8            weight e4m3fn [N, K]   weight_scale f32 []      with or without input_scale f32 []
      with weight_block_size    weight e4m3fn [N, K]   weight_scale_inv f32 [ceil(N / block), ceil(K / block)]
    quant_method fbgemm_fp8     weight e4m3fn [N, K]   weight_scale f32 [N, 1]

A number is scale * q, whatever the scale is called. Layers whose weight is of another floating type are plain. Sources:
the files of DeepSeek-V3 and Qwen3-FP8, AutoFP8, and Transformers 5, integrations/finegrained_fp8.py and fbgemm_fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ...backends.errors import Incompatible
from ...backends.formats import Axis, CheckpointFormat, Packed, Scheme, StoredTensor
from ...backends.quantization import WeightFormat
from ..models.fields import Fields
from .checks import check_shape, finite, stored
from .modules import is_listed
from .on_the_fly import OnTheFlyScheme

_FLOATS = ("bfloat16", "float16", "float32")
_WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
_INPUT_SCALES = ("input_scale", "activation_scale")
"""As AutoFP8 and as Transformers call them."""


class Fp8Format(CheckpointFormat):
    """Checkpoints of quant_method fp8 and fbgemm_fp8, and plain ones that are quantised while loading."""

    name = "fp8"

    def read(self, config: Mapping[str, object] | None) -> Scheme:
        """See CheckpointFormat.read. Raises ModelFormatError where config.json holds nonsense."""
        if config is None:
            return OnTheFlyScheme("fp8")
        fields = Fields(config, "quantization_config")
        skipped = tuple(
            name
            for key in ("modules_to_not_convert", "ignored_layers")
            for name in fields.texts(key)
        )
        if fields.text("quant_method", default="fp8") == "fbgemm_fp8":
            return Fp8Scheme("row", skipped=skipped)
        kind = fields.text("fmt", default="e4m3")
        if kind not in ("e4m3", "e4m3fn", "float8_e4m3fn"):
            raise Incompatible(
                f"quantization_config: fp8 of {kind} is not served, e4m3 is; fetch a checkpoint of e4m3"
            )
        activation = fields.text("activation_scheme", default="dynamic")
        if activation not in ("dynamic", "static"):
            raise fields.wrong("activation_scheme", "dynamic or static")
        block = _block(fields)
        if block is not None and activation == "static":
            raise Incompatible(
                "quantization_config: fp8 in blocks with static activations is not served; "
                "fetch a checkpoint with activation_scheme dynamic"
            )
        return Fp8Scheme(block or "layer", is_static=activation == "static", skipped=skipped)


def _block(fields: Fields) -> tuple[int, int] | None:
    match fields.value("weight_block_size"):
        case None:
            return None
        case [int(rows), int(columns)] if 0 < rows < 2**20 and 0 < columns < 2**20:
            return rows, columns
    raise fields.wrong("weight_block_size", "null, or rows and columns of a block")


class Fp8Scheme(Scheme):
    """`scales`: of the whole layer, of each row, or of blocks of rows and columns."""

    name = "fp8"

    def __init__(
        self,
        scales: Literal["layer", "row"] | tuple[int, int],
        *,
        is_static: bool = False,
        skipped: Sequence[str] = (),
    ) -> None:
        self._scales = scales
        self._is_static = is_static
        self._skipped = skipped

    def stored(
        self,
        module: str,
        in_features: int,  # noqa: ARG002 - axes are told by features
        out_features: int,  # noqa: ARG002
    ) -> Mapping[str, StoredTensor] | None:
        """See Scheme.stored. The type of weight says whether scales must be there, so they are optional here."""
        if is_listed(module, self._skipped):
            return None
        axes: tuple[Axis, ...] = ()
        if self._scales == "row":
            axes = (Axis(of="out"), Axis(of="none", size=1))
        elif self._scales != "layer":
            rows, columns = self._scales
            axes = (Axis(of="out", features=rows), Axis(of="in", features=columns))
        scale = StoredTensor(dtypes=("float32", *_FLOATS[:2]), axes=axes, optional=True)
        one = StoredTensor(dtypes=("float32", *_FLOATS[:2]), axes=(), optional=True)
        found = {
            "weight": StoredTensor(
                dtypes=("float8_e4m3fn", *_FLOATS), axes=(Axis(of="out"), Axis(of="in"))
            ),
            **dict.fromkeys(_WEIGHT_SCALES, scale),
            **dict.fromkeys(_INPUT_SCALES, one),
        }
        # an upper bound for the scales of inputs, of which the inputs' own are below
        return found | {"input_scale_ub": one} if self._scales == "row" else found

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:  # noqa: ARG002
        """See Scheme.pack."""
        weight = stored(tensors, "weight")
        if weight.dtype != torch.float8_e4m3fn:
            return Packed(format=WeightFormat(), tensors={"weight": weight})
        if bool(weight.isnan().any()):
            raise ValueError("weight holds nan")
        name = _one_of(tensors, _WEIGHT_SCALES)
        scale = finite(name, tensors[name])
        num_rows, num_columns = weight.shape
        form = WeightFormat(kind="fp8", activation="dynamic_token")
        if self._scales == "row":
            check_shape(name, scale, (num_rows, 1), "weight")
        elif self._scales == "layer":
            scale = _single(name, scale).expand(num_rows, 1)
        else:
            rows, columns = self._scales
            grid = -(-num_rows // rows), -(-num_columns // columns)
            check_shape(name, scale, grid, f"weight in blocks of {rows} x {columns}")
            form = replace(form, block=self._scales)
        found = {"weight": weight, "scale": scale.contiguous()}
        if self._is_static:
            name = _one_of(tensors, _INPUT_SCALES)
            found["input_scale"] = _single(name, finite(name, tensors[name]))
            form = replace(form, activation="static_tensor")
        return Packed(format=form, tensors=found)


def _one_of(tensors: Mapping[str, Tensor], names: Sequence[str]) -> str:
    there = [name for name in names if name in tensors]
    if len(there) != 1:
        what = "are both there" if there else "are missing, of which one must be there"
        raise ValueError(f"{' and '.join(names)} {what}, beside a weight of float8_e4m3fn")
    return there[0]


def _single(name: str, values: Tensor) -> Tensor:
    if values.numel() != 1:
        raise ValueError(f"{name} has the shape {list(values.shape)} where one number belongs")
    return values.reshape(())
