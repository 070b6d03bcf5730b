"""What a request may ask for, and how many may be here at once: errors before any work."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType

from ..backends.errors import Incompatible
from ..backends.options import SamplingParams
from ..core.errors import InvalidRequest, Overloaded
from ..core.messages import Ready
from .errors import ContextTooLong, WrongField
from .settings import ServerSettings

MAX_STOP_BYTES = 1024
"""Of one stop string."""
MAX_CHARS_PER_TOKEN = 64
"""Text longer than this for each token of the limit is refused before it is tokenized."""
MAX_REPETITION_PENALTY = 100.0
MAX_SEED = 2**64 - 1
MIN_SEED = -(2**63)
CHECKED_NEW_TOKENS = 1024
"""The native dialect holds only this many of max_new_tokens against the context; the rest ends by "length"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The operator's limits met with what the engine turned out to hold."""

    max_input_tokens: int
    max_total_tokens: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_client_batch_size: int
    max_logprobs: int
    max_logit_bias: int
    vocab_size: int
    features: frozenset[str]
    backend: str

    @classmethod
    def derive(cls, settings: ServerSettings, ready: Ready, vocab_size: int) -> Limits:
        """Raises Incompatible where --max-input-tokens leaves no room for an answer."""
        total = ready.max_context
        most = total - 1
        if settings.max_input_tokens is not None and settings.max_input_tokens > most:
            raise Incompatible(
                f"--max-input-tokens {settings.max_input_tokens} leaves nothing of the {total} tokens "
                f"a request may hold; give at most {most}, or a larger --max-total-tokens"
            )
        return cls(
            max_input_tokens=settings.max_input_tokens or most,
            max_total_tokens=total,
            max_stop_sequences=settings.max_stop_sequences,
            max_top_n_tokens=settings.max_top_n_tokens,
            max_client_batch_size=settings.max_client_batch_size,
            max_logprobs=ready.max_logprobs,
            max_logit_bias=ready.max_logit_bias,
            vocab_size=vocab_size,
            features=frozenset(ready.features),
            backend=ready.backend,
        )

    def check_stop(self, strings: tuple[str, ...]) -> None:
        """Raises WrongField."""
        if len(strings) > self.max_stop_sequences:
            raise WrongField(
                "stop",
                f"`stop` supports up to {self.max_stop_sequences} stop sequences. "
                f"Given: {len(strings)}",
            )
        for string in strings:
            if not 1 <= len(string.encode("utf-8", "replace")) <= MAX_STOP_BYTES:
                raise WrongField(
                    "stop", f"each of `stop` must have between 1 and {MAX_STOP_BYTES} bytes"
                )

    def check_sampling(self, sampling: SamplingParams) -> None:
        """What the device would ignore is refused. Raises InvalidRequest."""
        missing = sampling.features - self.features
        if missing:
            raise InvalidRequest(
                f"backend {self.backend} does not serve {', '.join(sorted(missing))}"
            )
        if (sampling.num_logprobs or 0) > self.max_logprobs:
            raise InvalidRequest(f"at most {self.max_logprobs} logprobs a token are served")
        if len(sampling.logit_bias) > self.max_logit_bias:
            raise WrongField(
                "logit_bias", f"`logit_bias` may hold at most {self.max_logit_bias} entries"
            )
        self.check_ids("logit_bias", tuple(sampling.logit_bias))

    def check_ids(self, param: str, ids: tuple[int, ...]) -> None:
        """Every id names a token. Raises WrongField."""
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            raise WrongField(param, f"`{param}` must hold ids from 0 to {self.vocab_size - 1}")

    def check_text(self, text: str) -> None:
        """Refuse what cannot fit whatever the tokenizer makes of it. Raises ContextTooLong."""
        most = self.max_input_tokens * MAX_CHARS_PER_TOKEN
        if len(text) > most:
            raise ContextTooLong(
                f"`inputs` must have less than {self.max_input_tokens} tokens. "
                f"Given: {len(text)} characters"
            )

    def check_lengths(
        self, num_prompt: int, max_new_tokens: int | None, *, lenient: bool
    ) -> int | None:
        """The new tokens that may be drawn; None: until the context is full. Raises ContextTooLong.

        `lenient` is the native dialect's rule (see CHECKED_NEW_TOKENS).
        """
        total = self.max_total_tokens
        if max_new_tokens is not None:
            held = min(max_new_tokens, CHECKED_NEW_TOKENS) if lenient else max_new_tokens
            if num_prompt + held > total:
                raise ContextTooLong(
                    f"`inputs` tokens + `max_new_tokens` must be <= {total}. "
                    f"Given: {num_prompt} `inputs` tokens and {max_new_tokens} `max_new_tokens`"
                )
        if num_prompt > self.max_input_tokens:
            raise ContextTooLong(
                f"`inputs` must have less than {self.max_input_tokens + 1} tokens. "
                f"Given: {num_prompt}"
            )
        return None if max_new_tokens is None else min(max_new_tokens, total - num_prompt)


class Ticket:
    """The right to run some requests, given back on leaving the `with`, or where it was kept on leaving the next."""

    def __init__(self, admission: Admission, count: int) -> None:
        self._admission = admission
        self._count = count
        self._kept = False

    def keep(self) -> Ticket:
        """Survive the `with` around this call: an answer that outlives its handler takes it over."""
        self._kept = True
        return self

    def release(self) -> None:
        """Give it back."""
        self._admission.give_back(self._count)
        self._count = 0

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._kept:
            self._kept = False
        else:
            self.release()


class Admission:
    """At most `limit` requests running and waiting."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self._changed = asyncio.Event()

    def admit(self, count: int = 1) -> Ticket:
        """Raises Overloaded."""
        if self.in_flight + count > self.limit:
            raise Overloaded(f"{self.limit} requests are running or waiting; try again later")
        self.in_flight += count
        return Ticket(self, count)

    def give_back(self, count: int) -> None:
        """For Ticket alone."""
        self.in_flight -= count
        self._changed.set()

    async def idle(self) -> None:
        """Until no request is here."""
        while self.in_flight:
            self._changed.clear()
            await self._changed.wait()
