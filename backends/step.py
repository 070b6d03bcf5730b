"""What crosses the border each step: StepBatch down (numpy), StepInputs inside (tensors), StepOutput up.

Sizes, all padded to the bucket:
    R rows (one request each)   T tokens of the step    L rows of logits        Q most tokens of a row
    M blocks a row may hold     P position axes, 1 or 3 V vocabulary            B block size

Padding has meaning, not position. Block 0 is null: never owned by a request; a plugin may write padding there, and
what lies in it may be nan. Padding rows have query and context length 0 and the request slot `num_slots` (a sink).
L >= 1 always, so that a step that draws nothing has the shape of others.

Decode rows come first. DECODE is a row that brings one token drawn by this engine since the row took its slot, and any
drafts after it; everything else, a last chunk of one token or a recomputed row too, is PREFILL.

Host arrays are numpy int32 or float32, C-contiguous. Index tensors on the device are int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from .shapes import Bucket

I32: TypeAlias = NDArray[np.int32]
F32: TypeAlias = NDArray[np.float32]
DeviceInputs: TypeAlias = Any
"""Pytree of the plugin's own; only the member it was made for reads it."""
Prepared: TypeAlias = Any
"""What Backend.prepare makes; the core hands it, unread, to wrapped functions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingBatch:
    """Per row of logits. What belongs to a feature is there exactly when the chosen variant has that feature."""

    features: frozenset[str]
    """One of ShapePolicy.draw_variants(); static in a graph."""
    slot: I32
    """[L] request slot that keeps the drawn id and counts it; pad (and rows with a target) num_slots.

    Rows of a request that brings drafts, 1 + K tokens and as many rows of logits, name the sink too: which of what they
    draw holds is known once it is fetched. Such a request uses no penalties; whether it fits, ShapePolicy.fit says."""
    position: I32
    """[L] index in the text of the token to draw."""
    temperature: F32 | None = None
    """sampled: [L], 0 = greedy."""
    seed: I32 | None = None
    """sampled: [L, 2] low and high word."""
    top_k: I32 | None = None
    """filters: [L], V = off."""
    top_p: F32 | None = None
    """filters: [L], 1 = off."""
    min_p: F32 | None = None
    """filters: [L], 0 = off."""
    typical_p: F32 | None = None
    """filters: [L], 1 = off."""
    penalties: F32 | None = None
    """penalties: [L, 3] repetition, frequency, presence."""
    bias_ids: I32 | None = None
    """bias: [L, max_logit_bias], pad -1."""
    bias_values: F32 | None = None
    """bias: [L, max_logit_bias]."""
    bitmask: I32 | None = None
    """bitmask: [L, ceil(V / 32)], bit 1 = allowed."""
    target: I32 | None = None
    """targets: [L] id to score instead of drawing (prompt logprobs), -1 = draw."""
    of_drawn: I32 | None = None
    """logprobs: [L] 1 = of the distribution drawn from (TGI), 0 = of the raw logits (OpenAI)."""
    watermark: I32 | None = None
    """watermark: [L] the token before, -1 = off."""


def neutral_sampling(
    features: frozenset[str],
    *,
    num_logits: int,
    num_slots: int,
    vocab_size: int,
    max_logit_bias: int,
) -> dict[str, I32 | F32]:
    """The arrays of a SamplingBatch for `features`, by name, with values that change nothing: what padding has."""
    integers: dict[str, tuple[str, int, tuple[int, ...]]] = {
        "seed": ("sampled", 0, (2,)),
        "top_k": ("filters", vocab_size, ()),
        "bias_ids": ("bias", -1, (max_logit_bias,)),
        "bitmask": ("bitmask", -1, (-(-vocab_size // 32),)),
        "target": ("targets", -1, ()),
        "of_drawn": ("logprobs", 0, ()),
        "watermark": ("watermark", -1, ()),
    }
    floats: dict[str, tuple[str, float, tuple[int, ...]]] = {
        "temperature": ("sampled", 0.0, ()),
        "top_p": ("filters", 1.0, ()),
        "min_p": ("filters", 0.0, ()),
        "typical_p": ("filters", 1.0, ()),
        "penalties": ("penalties", 0.0, (3,)),
        "bias_values": ("bias", 0.0, (max_logit_bias,)),
    }
    arrays: dict[str, I32 | F32] = {
        "slot": np.full(num_logits, num_slots, np.int32),
        "position": np.zeros(num_logits, np.int32),
    }
    for name, (feature, number, shape) in integers.items():
        if feature in features:
            arrays[name] = np.full((num_logits, *shape), number, np.int32)
    for name, (feature, value, shape) in floats.items():
        if feature in features:
            arrays[name] = np.full((num_logits, *shape), value, np.float32)
    if "penalties" in arrays:
        arrays["penalties"][:, 0] = 1  # repetition; the other two are added
    return arrays


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """One step, neutral and padded to its bucket."""

    bucket: Bucket
    """What it is padded to."""
    num_rows: int
    """True counts: never baked into a graph."""
    num_decode_rows: int
    """They come first."""
    num_tokens: int
    """True count."""
    num_logits: int
    """True count; 0: the step is not fetched."""
    token_ids: I32
    """[T], pad 0."""
    positions: I32
    """[P, T], pad 0."""
    query_len: I32
    """[R] tokens of the row in this step."""
    context_len: I32
    """[R] tokens of the row after this step."""
    row_slot: I32
    """[R] request slot."""
    block_table: Sequence[I32]
    """Per group: [R, M], pad 0."""
    logit_index: I32
    """[L] index into T, ascending; pad 0."""
    sampling: SamplingBatch
    """How the rows of logits are drawn."""
    token_slot: I32 | None = None
    """[T] slot whose last drawn id replaces token_ids, else -1; given iff overlapped_steps."""


def row_first(batch: StepBatch, layout: str) -> I32:
    """[R] index into T of each row's first token, under BatchPolicy.token_layout `layout`."""
    if layout == "rows":
        first = np.arange(batch.bucket.num_rows) * batch.bucket.max_query
    else:
        first = np.cumsum(batch.query_len) - batch.query_len
    return first.astype(np.int32)


def token_row(batch: StepBatch, layout: str) -> I32:
    """[T] row of each token, -1 on padding."""
    rows = np.repeat(np.arange(batch.bucket.num_rows), batch.query_len)
    offset = np.arange(rows.size) - np.repeat(
        np.cumsum(batch.query_len) - batch.query_len, batch.query_len
    )
    out = np.full(batch.bucket.num_tokens, -1, np.int32)
    out[row_first(batch, layout)[rows] + offset] = rows
    return out


def token_index(batch: StepBatch, layout: str) -> I32:
    """[T] index of each token in its row's text, 0 on padding. Not `positions`, which may have 3 axes."""
    row = token_row(batch, layout)
    start = batch.context_len - batch.query_len - row_first(batch, layout)
    index = start[row] + np.arange(batch.bucket.num_tokens)
    return np.where(row >= 0, index, 0).astype(np.int32)


def slot_mapping(batch: StepBatch, group: int, block_size: int, layout: str) -> I32:
    """[T] where in the cache of KV group `group` each token's key goes: block * B + offset, -1 on padding."""
    row, index = token_row(batch, layout), token_index(batch, layout)
    block = batch.block_table[group][row, index // block_size]
    return np.where(row >= 0, block * block_size + index % block_size, -1).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Device form of a StepBatch, as the model and the sampler see it inside a (traced) step.

    A registered pytree: tensors are leaves; bucket, features and which fields are None are structure.
    """

    bucket: Bucket
    """Static in a graph."""
    features: frozenset[str]
    """Of drawing; static in a graph."""
    token_ids: Tensor
    """[T]"""
    positions: Tensor
    """[P, T]"""
    logit_index: Tensor
    """[L]"""
    token_slot: Tensor | None
    """[T]"""
    attention: DeviceInputs
    """What Attention.attend reads."""
    sampling: DeviceInputs
    """What the Sampler reads."""


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """Device tensors until fetched, perhaps views of one buffer. A registered pytree like StepInputs.

    Fetched, the same fields hold numpy arrays (they cross processes).
    """

    ids: Tensor
    """[L] i32; where there is a target, the target."""
    finite: Tensor
    """[L] bool or i32: the raw logits held no nan or inf; the core ends rows that say no, and no other."""
    logprob: Tensor | None = None
    """logprobs: [L] f32 of ids."""
    rank: Tensor | None = None
    """logprobs: [L] i32 of ids, 1 = best."""
    top_ids: Tensor | None = None
    """logprobs: [L, max_logprobs] i32."""
    top_logprobs: Tensor | None = None
    """logprobs: [L, max_logprobs] f32."""


_INPUT_LEAVES = ("token_ids", "positions", "logit_index", "token_slot", "attention", "sampling")
_OUTPUT_LEAVES = ("ids", "finite", "logprob", "rank", "top_ids", "top_logprobs")


def _present(value: StepInputs | StepOutput, names: tuple[str, ...]) -> tuple[str, ...]:
    # torch's pytree counts None as a leaf, so which fields are there goes into the context
    return tuple(name for name in names if getattr(value, name) is not None)


def _flatten_inputs(value: StepInputs) -> tuple[list[Any], Any]:
    names = _present(value, _INPUT_LEAVES)
    return [getattr(value, name) for name in names], (value.bucket, value.features, names)


def _unflatten_inputs(leaves: Any, context: Any) -> StepInputs:
    bucket, features, names = context
    fields = dict.fromkeys(_INPUT_LEAVES) | dict(zip(names, leaves, strict=True))
    return StepInputs(bucket=bucket, features=features, **fields)  # type: ignore[arg-type]


def _flatten_output(value: StepOutput) -> tuple[list[Any], Any]:
    names = _present(value, _OUTPUT_LEAVES)
    return [getattr(value, name) for name in names], names


def _unflatten_output(leaves: Any, names: Any) -> StepOutput:
    return StepOutput(**dict(zip(names, leaves, strict=True)))


pytree.register_pytree_node(StepInputs, _flatten_inputs, _unflatten_inputs)
pytree.register_pytree_node(StepOutput, _flatten_output, _unflatten_output)
