"""A StepBatch on its way to the device: one flat buffer a dtype, so that a step costs two copies at most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..shapes import Bucket
from ..step import F32, I32, SamplingBatch, StepBatch, StepInputs

SAMPLING_FIELDS = tuple(n for n in SamplingBatch.__dataclass_fields__ if n != "features")
ATTENTION, SAMPLING = "attention.", "sampling."


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """Where an array lies in the flat buffer of its dtype."""

    name: str
    floating: bool
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged:
    """What `stage` made (Prepared): the arrays of a step end to end, int32 and float32 apart."""

    bucket: Bucket
    features: frozenset[str]
    integers: Tensor
    """[number of integers] i32"""
    floats: Tensor | None
    """[number of floats] f32; None where the step has none."""
    layout: tuple[Field, ...]
    """Equal for equal buckets and features, so it may be part of a graph's key."""


def stage(
    batch: StepBatch, attention: Mapping[str, I32 | F32], put: Callable[[Tensor], Tensor]
) -> Staged:
    """Lay the batch and the plugin's own arrays for attention end to end and `put` each buffer on the device."""
    layout: list[Field] = []
    buffers: dict[bool, list[I32 | F32]] = {False: [], True: []}
    offsets = {False: 0, True: 0}
    for name, array in _arrays(batch, attention).items():
        floating = array.dtype == np.float32
        layout.append(
            Field(name=name, floating=floating, offset=offsets[floating], shape=array.shape)
        )
        buffers[floating].append(array.ravel())
        offsets[floating] += array.size
    return Staged(
        bucket=batch.bucket,
        features=batch.sampling.features,
        integers=put(torch.from_numpy(np.concatenate(buffers[False]))),
        floats=put(torch.from_numpy(np.concatenate(buffers[True]))) if buffers[True] else None,
        layout=tuple(layout),
    )


def unpack(staged: Staged) -> StepInputs:
    """The arrays as views of the buffers: nothing is copied. `attention` and `sampling` are dicts of tensors."""
    plain: dict[str, Tensor] = {}
    attention: dict[str, Tensor] = {}
    sampling: dict[str, Tensor] = {}
    for field in staged.layout:
        buffer = staged.floats if field.floating else staged.integers
        assert buffer is not None
        view = buffer[field.offset : field.offset + prod(field.shape)].reshape(field.shape)
        if field.name.startswith(ATTENTION):
            attention[field.name.removeprefix(ATTENTION)] = view
        elif field.name.startswith(SAMPLING):
            sampling[field.name.removeprefix(SAMPLING)] = view
        else:
            plain[field.name] = view
    return StepInputs(
        bucket=staged.bucket,
        features=staged.features,
        token_ids=plain["token_ids"],
        positions=plain["positions"],
        logit_index=plain["logit_index"],
        token_slot=plain.get("token_slot"),
        attention=attention,
        sampling=sampling,
    )


def sampling_arrays(sampling: SamplingBatch) -> dict[str, I32 | F32]:
    """The fields that the step's features call for, by name."""
    found = {name: getattr(sampling, name) for name in SAMPLING_FIELDS}
    return {name: array for name, array in found.items() if array is not None}


def _arrays(batch: StepBatch, attention: Mapping[str, I32 | F32]) -> dict[str, I32 | F32]:
    arrays: dict[str, I32 | F32] = {
        "token_ids": batch.token_ids,
        "positions": batch.positions,
        "logit_index": batch.logit_index,
    }
    if batch.token_slot is not None:
        arrays["token_slot"] = batch.token_slot
    arrays |= {ATTENTION + name: array for name, array in attention.items()}
    return arrays | {SAMPLING + n: array for n, array in sampling_arrays(batch.sampling).items()}
