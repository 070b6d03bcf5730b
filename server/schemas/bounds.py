"""Bounded field types of both dialects: every number is finite and has a least and a greatest value."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..limits import (
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MIN_SEED,
)
from ..settings import MAX_COUNT, MAX_TEMPERATURE


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can write half of a surrogate pair, which nothing past it can
        raise ValueError("half of a surrogate pair is no character") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)]
TokenId = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Temperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
ShareOrNone = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Repetition = Annotated[float, Field(gt=0, le=MAX_REPETITION_PENALTY, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class Body(BaseModel):
    """A request's body: "1" is no number, and unknown fields are accepted and change nothing."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
