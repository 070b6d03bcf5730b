"""From TGI's requests to jobs, and from pieces to TGI's answers and events."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

from msgspec import UNSET

from ...backends.options import SamplingParams
from ...core.errors import InvalidRequest
from ...core.messages import Token
from ..errors import WrongField
from ..generation import Generation
from ..job import Job, Piece
from ..limits import Limits
from ..schemas.tgi import (
    Details,
    Generated,
    GenerateRequest,
    NativeToken,
    Parameters,
    StreamDetails,
    StreamEvent,
)
from ..service import Model
from ..streaming import frame

_FINISH = {"eos": "eos_token", "stop": "stop_sequence", "length": "length"}


def native_job(body: GenerateRequest, limits: Limits, *, streams: bool) -> Job:
    """Raises InvalidRequest."""
    # without any parameters TGI samples, with some it is greedy unless they ask for more
    parameters = body.parameters or Parameters(do_sample=True)
    top_n = parameters.top_n_tokens or 0
    if top_n > limits.max_top_n_tokens:
        raise WrongField(
            "top_n_tokens",
            f"`top_n_tokens` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {top_n}",
        )
    if not body.inputs:
        raise InvalidRequest("`inputs` cannot be empty")
    if parameters.truncate is not None and parameters.truncate > limits.max_input_tokens:
        raise WrongField(
            "truncate",
            f"`truncate` must be strictly positive and less than {limits.max_input_tokens}. "
            f"Given: {parameters.truncate}",
        )
    shows_tokens = streams or bool(parameters.details)
    # a backend without logprobs still streams; asking it for top_n_tokens is refused
    can_score = "logprobs" in limits.features or top_n > 0
    return Job(
        prompt=body.inputs,
        sampling=_sampling(parameters, top_n if shows_tokens and can_score else None),
        max_new_tokens=parameters.max_new_tokens,
        stop_strings=tuple(parameters.stop or ()),
        truncate=parameters.truncate,
        native=True,
    )


def _sampling(parameters: Parameters, num_logprobs: int | None) -> SamplingParams:
    temperature = 1.0 if parameters.temperature is None else float(parameters.temperature)
    top_p = 1.0 if parameters.top_p is None else float(parameters.top_p)
    typical_p = 1.0 if parameters.typical_p is None else float(parameters.typical_p)
    # as TGI's server decides: a value that changes nothing does not switch sampling on
    warps = temperature != 1 or parameters.top_k is not None or top_p < 1 or typical_p < 1
    samples = bool(parameters.do_sample) or warps
    seed = parameters.seed
    if samples and seed is None:
        # drawn here because the answer names it
        seed = secrets.randbits(63)
    return SamplingParams(
        temperature=temperature if samples else 0.0,
        top_k=parameters.top_k,
        top_p=top_p,
        typical_p=typical_p,
        repetition_penalty=float(parameters.repetition_penalty or 1.0),
        frequency_penalty=float(parameters.frequency_penalty or 0.0),
        seed=seed if samples else None,
        num_logprobs=num_logprobs,
    )


class Native:
    """The answer to one native request."""

    def __init__(
        self, body: GenerateRequest, model: Model, generation: Generation, *, full_text: bool
    ) -> None:
        parameters = body.parameters or Parameters()
        self._generation = generation
        self._tokenizer = model.generator.tokenizer
        self._details = bool(parameters.details)
        self._with_top = bool(parameters.top_n_tokens)
        wanted = parameters.return_full_text
        self._prefix = body.inputs if (full_text if wanted is None else wanted) else ""
        self._num_characters = len(body.inputs)

    async def whole(self) -> Generated:
        """Not streamed."""
        text: list[str] = []
        tokens: list[NativeToken] = []
        tops: list[list[NativeToken]] = []
        async with aclosing(self._generation.pieces()) as pieces:
            async for piece in pieces:
                text.append(piece.raw)
                if self._details:
                    tokens.append(self._token(piece))
                    tops.append(self._top(piece.token))
        generated = self._prefix + "".join(text)
        if not self._details:
            return Generated(generated)
        details = Details(
            finish_reason=self._finish(),
            generated_tokens=self._generation.num_generated,
            seed=self._generation.job.sampling.seed,
            tokens=tokens,
            top_tokens=tops if self._with_top else UNSET,
        )
        return Generated(generated, details)

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """An event a token; the last holds the whole text."""
        text: list[str] = []
        async with aclosing(self._generation.pieces()) as pieces:
            async for piece in pieces:
                text.append(piece.raw)
                ends = piece.finish is not None
                yield frame(
                    StreamEvent(
                        index=self._generation.num_generated,
                        token=self._token(piece),
                        top_tokens=self._top(piece.token) if self._with_top else UNSET,
                        generated_text=self._prefix + "".join(text) if ends else None,
                        details=self._stream_details() if ends and self._details else None,
                    )
                )

    def headers(self, compute_type: str) -> dict[str, str]:
        """TGI's figures of a request that has ended, in milliseconds unless named otherwise."""
        one = self._generation
        inference = one.ended - one.validated
        per_token = inference / max(1, one.num_generated)
        return {
            "x-compute-type": compute_type,
            "x-compute-time": f"{one.ended - one.started:.6f}",
            "x-compute-characters": str(self._num_characters),
            "x-total-time": _ms(one.ended - one.started),
            "x-validation-time": _ms(one.validated - one.started),
            "x-inference-time": _ms(inference),
            "x-time-per-token": _ms(per_token),
            "x-prompt-tokens": str(one.num_prompt),
            "x-generated-tokens": str(one.num_generated),
        }

    def _finish(self) -> str:
        one = self._generation
        # TGI looks at the length first: an end of text on the last token allowed is a "length"
        if one.finish == "eos" and one.num_generated == one.max_new_tokens:
            return "length"
        return _FINISH[one.finish or "length"]

    def _stream_details(self) -> StreamDetails:
        one = self._generation
        return StreamDetails(
            finish_reason=self._finish(),
            generated_tokens=one.num_generated,
            seed=one.job.sampling.seed,
            input_length=one.num_prompt,
        )

    def _token(self, piece: Piece) -> NativeToken:
        one = piece.token
        text = self._tokenizer.token_text(one.id) if piece.special else piece.raw
        return NativeToken(one.id, text, one.logprob, piece.special)

    def _top(self, token: Token) -> list[NativeToken]:
        tokenizer = self._tokenizer
        return [
            NativeToken(one, tokenizer.token_text(one), logprob, tokenizer.is_special(one))
            for one, logprob in zip(token.top_ids, token.top_logprobs, strict=True)
        ]


def _ms(seconds: float) -> str:
    return str(int(seconds * 1000))
