"""The native dialect, TGI's: pydantic for what comes in, msgspec for what goes out."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field

from ..settings import MAX_TEMPERATURE
from .bounds import Body, Count, Penalty, Positive, Repetition, Share, Text

NativeTemperature = Annotated[float, Field(gt=0, le=MAX_TEMPERATURE, allow_inf_nan=False)]
NativeSeed = Annotated[int, Field(ge=0, le=2**64 - 1)]


class Parameters(Body):
    """How to go on; every field may be left out."""

    temperature: NativeTemperature | None = None
    repetition_penalty: Repetition | None = None
    frequency_penalty: Penalty | None = None
    top_k: Positive | None = None
    top_p: Share | None = None
    typical_p: Share | None = None
    do_sample: bool | None = None
    max_new_tokens: Positive | None = None
    return_full_text: bool | None = None
    stop: Annotated[list[Text], Field(max_length=1024)] | None = None
    truncate: Positive | None = None
    details: bool | None = None
    seed: NativeSeed | None = None
    top_n_tokens: Count | None = None


class GenerateRequest(Body):
    """POST /generate and /generate_stream."""

    inputs: Text
    parameters: Parameters | None = None


class CompatRequest(GenerateRequest):
    """POST /."""

    stream: bool | None = None


class NativeToken(msgspec.Struct, frozen=True):
    """A drawn token, or one that might have been."""

    id: int
    text: str
    logprob: float | None
    special: bool


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer came about."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[Any] = []
    tokens: list[NativeToken]
    top_tokens: list[list[NativeToken]] | UnsetType = UNSET


class Generated(msgspec.Struct, frozen=True):
    """Of POST /generate."""

    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(msgspec.Struct, frozen=True, kw_only=True):
    """With the last event."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One token of POST /generate_stream."""

    index: int
    token: NativeToken
    top_tokens: list[NativeToken] | UnsetType = UNSET
    generated_text: str | None = None
    details: StreamDetails | None = None
