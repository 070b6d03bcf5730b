"""GPTQ: 4 or 8 bits in groups along the input, with zero points, and with desc_act in an order of their own. Stored:

    qweight i32 [K * bits / 32, N]   qzeros i32 [G, N * bits / 32]   scales f16 [G, N]   g_idx i32 [K]

A word holds inputs (qweight) or outputs (qzeros) one after the other from its lowest bits up. g_idx is the group of
each input. A number is scale * (q - zero). Zero points are stored as they are in checkpoint_format gptq_v2, less one in
gptq: AutoGPTQ takes it from each, modulo 2 ** bits, and GPTQModel from whole words, where a 0 borrows from the next.
Sources: AutoGPTQ 0.7.1, nn_modules/qlinear/qlinear_cuda_old.py; GPTQModel 7.7, utils/model.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from ...backends.errors import Incompatible
from ...backends.formats import Axis, CheckpointFormat, Packed, Scheme, StoredTensor
from ...backends.quantization import WeightFormat
from ..models.fields import Fields
from .checks import check_shape, finite, stored
from .modules import is_listed
from .numbers import join_numbers, split_words
from .permuted import Columns, lay_out

_KINDS = {4: "int4", 8: "int8"}


class GptqFormat(CheckpointFormat):
    """Checkpoints of AutoGPTQ, GPTQModel and of what writes their layout."""

    name = "gptq"

    def read(self, config: Mapping[str, object] | None) -> Scheme:
        """See CheckpointFormat.read. Raises ModelFormatError where config.json holds nonsense."""
        if config is None:
            raise Incompatible(
                "--quantize gptq serves checkpoints that are stored so, and this one is not; "
                "choose int4, int8 or fp8, which are made while loading, or another checkpoint"
            )
        fields = Fields(config, "quantization_config")
        bits = fields.integer("bits", low=1, high=32)
        if bits not in _KINDS:
            raise _not_served(f"{bits} bits", "4 and 8 bits")
        layout = fields.text(fields.first("checkpoint_format", "format"), default="gptq").lower()
        if fields.boolean("is_marlin_format", default=False):
            layout = "marlin"
        if layout not in ("gptq", "gptq_v2"):
            raise _not_served(f"checkpoint_format {layout}", "gptq and gptq_v2")
        if fields.text("pack_dtype", default="int32") != "int32":
            raise _not_served(f"pack_dtype {fields.text('pack_dtype')}", "int32")
        if fields.has("dynamic") and fields.value("dynamic") != {}:
            raise _not_served("`dynamic`, which gives layers settings of their own,", "one for all")
        if fields.boolean("lm_head", default=False):
            raise _not_served("a quantised lm_head", "a plain one")
        group_size = fields.integer("group_size", low=-1, high=2**20)
        if group_size == 0:
            raise fields.wrong("group_size", "-1, or a size above 0")
        settings = GptqSettings(
            bits=bits,
            group_size=None if group_size == -1 else group_size,
            # files of tools that leave it out have g_idx, which tells
            desc_act=fields.boolean("desc_act", default=True),
            symmetric=fields.boolean("sym", default=False),
            one_less=layout == "gptq",
            by_words="gptqmodel" in _quantizer(fields),
        )
        return GptqScheme(settings, fields.texts("modules_to_not_convert"))


@dataclass(frozen=True, kw_only=True, slots=True)
class GptqSettings:
    """Of all layers."""

    bits: int
    group_size: int | None
    desc_act: bool
    """Groups are of inputs that g_idx names, not of neighbours."""
    symmetric: bool
    """All zero points are in the middle."""
    one_less: bool
    """Zero points are stored so."""
    by_words: bool
    """One was taken from each number of a word at once."""


class GptqScheme(Scheme):
    """See the module."""

    name = "gptq"

    def __init__(self, settings: GptqSettings, skipped: Sequence[str]) -> None:
        self._settings = settings
        self._skipped = skipped

    def stored(
        self,
        module: str,
        in_features: int,
        out_features: int,  # noqa: ARG002 - its axes are told by features
    ) -> Mapping[str, StoredTensor] | None:
        """See Scheme.stored."""
        if is_listed(module, self._skipped):
            return None
        settings, per_word = self._settings, 32 // self._settings.bits
        size = settings.group_size or in_features
        if settings.desc_act or settings.group_size is None:
            groups = Axis(of="none", size=-(-in_features // size))
        else:
            groups = Axis(of="in", features=size)
        return {
            "qweight": StoredTensor(
                dtypes=("int32",), axes=(Axis(of="in", features=per_word), Axis(of="out"))
            ),
            "qzeros": StoredTensor(
                dtypes=("int32",), axes=(groups, Axis(of="out", features=per_word))
            ),
            "scales": StoredTensor(
                dtypes=("float16", "bfloat16", "float32"), axes=(groups, Axis(of="out"))
            ),
            "g_idx": StoredTensor(
                dtypes=("int32", "int64"), axes=(Axis(of="in"),), optional=not settings.desc_act
            ),
        }

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:  # noqa: ARG002
        """See Scheme.pack."""
        bits = self._settings.bits
        numbers = split_words(stored(tensors, "qweight").T, bits)
        num_outputs, num_inputs = numbers.shape
        scales = finite("scales", stored(tensors, "scales"))
        num_groups = scales.shape[0]
        check_shape("scales", scales, (num_groups, num_outputs), "qweight")
        zeros = self._zeros(stored(tensors, "qzeros"))
        check_shape("qzeros", zeros, (num_groups, num_outputs), "scales")
        groups = self._groups(tensors, num_inputs, num_groups)
        middle = 2 ** (bits - 1)
        is_symmetric = self._settings.symmetric and bool((zeros == middle).all())
        values = {"scale": scales.T.contiguous()}
        if not is_symmetric:
            values["zero_point"] = zeros.T.float().contiguous() - (0 if bits == 4 else middle)
        form = WeightFormat(kind=_KINDS[bits], zero_points="none" if is_symmetric else "whole")
        if bits == 8:
            numbers = numbers.view(torch.int8) ^ -128
        return _canonical(form, numbers, groups, values)

    def _zeros(self, words: Tensor) -> Tensor:
        """i32 [G, N * bits / 32] -> u8 [G, N]"""
        bits, one_less = self._settings.bits, self._settings.one_less
        if one_less and self._settings.by_words:
            return split_words(words + (0x1111_1111 if bits == 4 else 0x0101_0101), bits)
        zeros = split_words(words, bits)
        return (zeros + 1) & (2**bits - 1) if one_less else zeros

    def _groups(self, tensors: Mapping[str, Tensor], num_inputs: int, num_groups: int) -> Tensor:
        """i64 [K]"""
        size = self._settings.group_size or num_inputs
        in_order = torch.arange(num_inputs) // size
        if not self._settings.desc_act and -(-num_inputs // size) != num_groups:
            raise ValueError(
                f"scales has {num_groups} rows, which are not those of {num_inputs} inputs in groups of {size}"
            )
        if "g_idx" not in tensors and not self._settings.desc_act:
            return in_order
        groups = check_shape("g_idx", stored(tensors, "g_idx"), (num_inputs,), "qweight").long()
        if self._settings.group_size is None:
            return in_order
        if not self._settings.desc_act:
            # a rank's part begins with some group of the whole
            if not torch.equal(groups - groups[0], in_order):
                raise ValueError(
                    "g_idx holds an order of its own, and config.json says desc_act false"
                )
            return in_order
        if int(groups.min()) < 0 or int(groups.max()) >= num_groups:
            raise ValueError(f"g_idx holds groups beyond 0 to {num_groups - 1}, which scales has")
        return groups


def _quantizer(fields: Fields) -> str:
    """What wrote the checkpoint, where it says so."""
    meta = fields.section("meta")
    found = None if meta is None else meta.value("quantizer")
    return str(found).lower()


def _canonical(
    form: WeightFormat, numbers: Tensor, groups: Tensor, values: Mapping[str, Tensor]
) -> Packed:
    """From numbers [N, K], the group [K] of each input and values [N, G]."""
    if bool((groups[1:] < groups[:-1]).any()):
        columns = Columns(
            numbers=numbers,
            features=torch.arange(len(groups)),
            groups=groups,
            values=values,
            rest={},
        )
        return lay_out(columns, form, len(groups))
    ids, counts = torch.unique_consecutive(groups, return_counts=True)
    # the last group of a row may be smaller
    size = gcd(*counts.tolist())
    pieces = torch.repeat_interleave(ids, counts // size)
    tensors = {name: value.index_select(1, pieces) for name, value in values.items()}
    tensors["weight"] = join_numbers(form.kind, numbers)
    return Packed(
        format=replace(form, group_size=size if len(pieces) > 1 else None), tensors=tensors
    )


def _not_served(what: str, served: str) -> Incompatible:
    return Incompatible(
        f"quantization_config: gptq with {what} is not served, {served} is; fetch such a checkpoint"
    )
