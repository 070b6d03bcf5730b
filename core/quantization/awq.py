"""AWQ: 4 bits with zero points, in groups along the input. Stored for GEMM kernels:

    qweight i32 [K, N / 8]   qzeros i32 [K / group, N / 8]   scales f16 [K / group, N]

Eight outputs lie in a word. From the lowest bits up they are those of offsets 0 2 4 6 1 3 5 7. A number is
scale * (q - zero). Source: AutoAWQ 0.2.9, awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ...backends.errors import Incompatible
from ...backends.formats import Axis, CheckpointFormat, Packed, Scheme, StoredTensor
from ...backends.quantization import WeightFormat
from ..models.fields import Fields
from .checks import check_shape, finite, stored
from .modules import is_listed
from .numbers import join_nibbles, split_words

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the outputs of offsets 0 to 7 lie."""


class AwqFormat(CheckpointFormat):
    """Checkpoints of AutoAWQ and of what writes its layout."""

    name = "awq"

    def read(self, config: Mapping[str, object] | None) -> Scheme:
        """See CheckpointFormat.read. Raises ModelFormatError where config.json holds nonsense."""
        if config is None:
            raise Incompatible(
                "--quantize awq serves checkpoints that are stored so, and this one is not; "
                "choose int4, int8 or fp8, which are made while loading, or another checkpoint"
            )
        fields = Fields(config, "quantization_config")
        version = fields.text(fields.first("version", "format"), default="gemm").lower()
        if version != "gemm":
            raise Incompatible(
                f"quantization_config: awq stored for {version} is not served, gemm is; "
                "fetch a checkpoint of version gemm"
            )
        bits = fields.integer(fields.first("bits", "w_bit"), low=1, high=32, default=4)
        if bits != 4:
            raise Incompatible(
                f"quantization_config: awq of {bits} bits is not served, 4 are; fetch a checkpoint of 4 bits"
            )
        if not fields.boolean("zero_point", default=True):
            raise Incompatible(
                "quantization_config: awq without zero points is not served; fetch a checkpoint with zero_point true"
            )
        size = fields.first("group_size", "q_group_size")
        group_size = fields.integer(size, low=-1, high=2**20, default=128)
        if group_size == 0:
            raise fields.wrong(size, "-1, or a size above 0")
        skipped = fields.texts("modules_to_not_convert")
        return AwqScheme(None if group_size == -1 else group_size, skipped)


class AwqScheme(Scheme):
    """`group_size` None: a whole row."""

    name = "awq"

    def __init__(self, group_size: int | None, skipped: Sequence[str]) -> None:
        self._group_size = group_size
        self._skipped = skipped

    def stored(
        self,
        module: str,
        in_features: int,  # noqa: ARG002 - axes are told by features
        out_features: int,  # noqa: ARG002
    ) -> Mapping[str, StoredTensor] | None:
        """See Scheme.stored."""
        if is_listed(module, self._skipped):
            return None
        groups = (
            Axis(of="in", features=self._group_size)
            if self._group_size
            else Axis(of="none", size=1)
        )
        words = Axis(of="out", features=8)
        return {
            "qweight": StoredTensor(dtypes=("int32",), axes=(Axis(of="in"), words)),
            "qzeros": StoredTensor(dtypes=("int32",), axes=(groups, words)),
            "scales": StoredTensor(
                dtypes=("float16", "bfloat16", "float32"), axes=(groups, Axis(of="out"))
            ),
        }

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:  # noqa: ARG002
        """See Scheme.pack."""
        weight = _outputs_in_order(stored(tensors, "qweight"))
        num_inputs, num_outputs = weight.shape
        size = self._group_size or num_inputs
        if num_inputs % size:
            raise ValueError(f"qweight has {num_inputs} rows, which are no groups of {size}")
        grid, because = (num_inputs // size, num_outputs), f"qweight in groups of {size}"
        zeros = _outputs_in_order(stored(tensors, "qzeros"))
        check_shape("qzeros", zeros, grid, because)
        scales = finite("scales", check_shape("scales", stored(tensors, "scales"), grid, because))
        return Packed(
            format=WeightFormat(
                kind="int4", group_size=size if grid[0] > 1 else None, zero_points="whole"
            ),
            tensors={
                "weight": join_nibbles(weight.T),
                "scale": scales.T.contiguous(),
                "zero_point": zeros.T.float().contiguous(),
            },
        )


def _outputs_in_order(words: Tensor) -> Tensor:
    """i32 [R, N / 8] -> u8 [R, N]"""
    numbers = split_words(words, 4)
    by_word = numbers.view(*numbers.shape[:-1], -1, 8)
    return by_word[..., list(_PLACES)].flatten(-2)
