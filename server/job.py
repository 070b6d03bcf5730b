"""A request and what came of it, in no dialect's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..backends.options import SamplingParams
from ..core.messages import Token

Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One prompt and how to go on from it."""

    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    """Beside the model's own."""
    ignore_eos: bool = False
    add_special_tokens: bool = True
    truncate: int | None = None
    """Keep the last n tokens of the prompt."""
    native: bool = False
    """Logprobs are of the distribution drawn from, and only 1024 new tokens count against the context."""
    cache_salt: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one drawn token added."""

    token: Token
    text: str
    """Safe to show: before any stop string, and without what may still become one."""
    raw: str
    """All text that the token completed, stop strings too; special tokens have none."""
    special: bool
    finish: Finish | None = None
    """With the last piece."""
