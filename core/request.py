"""Request: one text being generated, and the only legal changes of its state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ..backends.options import SamplingParams
from .kv_cache.manager import BlockTable
from .messages import Submit

MAX_SUPPRESSION = -1e30
"""Added to the logits of what must not be drawn; finite, because some devices forbid infinities."""


class FinishReason(StrEnum):
    """Why a text ended."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(eq=False, slots=True)
class Request:
    """Waiting while it has no slot, running while it has one, finished once it has a reason.

    Tokens `[0, num_computed)` have their keys and values in the cache.
    """

    id: int
    tokens: list[int]
    """Prompt, then output."""
    num_prompt: int
    sampling: SamplingParams
    max_new_tokens: int
    min_new_tokens: int
    stop_ids: frozenset[int]
    """Ids that end the text."""
    of_drawn: bool
    salt: str
    slot: int | None = None
    table: BlockTable | None = None
    num_computed: int = 0
    num_cached: int = 0
    """Prompt tokens that the prefix cache held when it first ran."""
    is_steady: bool = False
    """Drew a token since it took its slot, so that the next row may be a decode row."""
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

    @classmethod
    def from_submit(cls, submit: Submit, *, max_new_tokens: int) -> Request:
        """A waiting request."""
        return cls(
            id=submit.request_id,
            tokens=list(submit.prompt),
            num_prompt=len(submit.prompt),
            sampling=submit.sampling,
            max_new_tokens=max_new_tokens,
            min_new_tokens=0 if submit.ignore_eos else submit.min_new_tokens,
            stop_ids=frozenset() if submit.ignore_eos else frozenset(submit.stop_ids),
            of_drawn=submit.of_drawn,
            salt=submit.cache_salt,
        )

    @property
    def num_output(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def max_tokens(self) -> int:
        """Tokens whose keys the cache must hold at the end: the last one drawn is never computed."""
        return self.num_prompt + self.max_new_tokens - 1

    @property
    def is_decoding(self) -> bool:
        """Whether its next row is one token that it drew itself."""
        return self.is_steady and self.num_computed == len(self.tokens) - 1

    @property
    def is_suppressing_stop(self) -> bool:
        """Whether the next token must not be one that ends the text."""
        return bool(self.stop_ids) and self.num_output < self.min_new_tokens

    @property
    def features(self) -> frozenset[str]:
        """Features of drawing that its next token needs."""
        features = self.sampling.features
        return features | {"bias"} if self.is_suppressing_stop else features

    @property
    def bias(self) -> dict[int, float]:
        """What is added to the logits of its next token."""
        bias = dict(self.sampling.logit_bias)
        if self.is_suppressing_stop:
            bias |= dict.fromkeys(self.stop_ids, MAX_SUPPRESSION)
        return bias

    def admit(self, slot: int, table: BlockTable) -> None:
        """Waiting to running, from what the prefix cache brought."""
        assert self.slot is None
        assert self.finish_reason is None
        self.slot, self.table = slot, table
        self.num_computed = table.num_cached_tokens
        if self.num_preemptions == 0:
            self.num_cached = table.num_cached_tokens

    def preempt(self) -> None:
        """Running to waiting; everything is recomputed."""
        self.leave()
        self.num_preemptions += 1

    def advance(self, num_tokens: int) -> None:
        """A step computed its next `num_tokens` tokens."""
        self.num_computed += num_tokens
        assert self.num_computed <= len(self.tokens)

    def draw(self, token: int) -> None:
        """A step drew its next token; it may be the last."""
        self.tokens.append(token)
        self.is_steady = True
        if token in self.stop_ids and self.num_output >= self.min_new_tokens:
            self.finish_reason = FinishReason.STOP
        elif self.num_output >= self.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH

    def fail(self) -> None:
        """A step failed for it alone."""
        self.finish_reason = FinishReason.ERROR

    def leave(self) -> None:
        """Running to finished or cancelled; what it held is not its own any more."""
        assert self.slot is not None
        self.slot = self.table = None
        self.num_computed = 0
        self.is_steady = False
