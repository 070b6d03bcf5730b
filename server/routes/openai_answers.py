"""From pieces to OpenAI's answers and chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from ... import __version__
from ...core.messages import Token
from ..generation import Generation, merged
from ..job import Piece
from ..ports import TextTokenizer
from ..schemas.openai import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Delta,
    PromptDetails,
    Sampling,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from ..service import Model
from ..streaming import frame

FINGERPRINT = f"{__version__}-native"
_FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


def _usage(generations: Sequence[Generation]) -> Usage:
    prompt = sum(one.num_prompt for one in generations)
    drawn = sum(one.num_generated for one in generations)
    cached = sum(one.num_cached for one in generations)
    return Usage(prompt, drawn, prompt + drawn, PromptDetails(cached))


def _wants_usage(body: Sampling) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


class Chat:
    """One answer to one chat request."""

    def __init__(self, body: ChatRequest, model: Model, generation: Generation) -> None:
        self._generation = generation
        self._tokenizer = model.generator.tokenizer
        self._with_logprobs = bool(body.logprobs)
        self._with_usage = _wants_usage(body)
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = body.model or model.files.name

    async def whole(self) -> ChatAnswer:
        """Not streamed."""
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        async with aclosing(self._generation.pieces()) as pieces:
            async for piece in pieces:
                texts.append(piece.text)
                if self._with_logprobs:
                    logprobs.append(_logprob(self._tokenizer, piece.token))
        choice = ChatChoice(
            message=AnswerMessage(content="".join(texts)),
            logprobs=ChatLogprobs(logprobs) if self._with_logprobs else None,
            finish_reason=_FINISH[self._generation.finish or "length"],
        )
        return ChatAnswer(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=FINGERPRINT,
            choices=[choice],
            usage=_usage([self._generation]),
        )

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Streamed, without [DONE]."""
        yield self._chunk(ChunkChoice(delta=Delta(role="assistant", content="")))
        async with aclosing(self._generation.pieces()) as pieces:
            async for piece in pieces:
                logprobs = None
                if self._with_logprobs:
                    logprobs = ChatLogprobs([_logprob(self._tokenizer, piece.token)])
                if piece.text or logprobs:
                    yield self._chunk(
                        ChunkChoice(delta=Delta(content=piece.text), logprobs=logprobs)
                    )
        finish = _FINISH[self._generation.finish or "length"]
        yield self._chunk(ChunkChoice(delta=Delta(), finish_reason=finish))
        if self._with_usage:
            yield self._chunk(None, _usage([self._generation]))

    def _chunk(self, choice: ChunkChoice | None, usage: Usage | None = None) -> bytes:
        return frame(
            ChatChunk(
                id=self._id,
                created=self._created,
                model=self._model,
                system_fingerprint=FINGERPRINT,
                choices=[] if choice is None else [choice],
                usage=usage,
            )
        )


class Completion:
    """The answer to one completion request: a choice a prompt."""

    def __init__(
        self, body: CompletionRequest, model: Model, generations: Sequence[Generation]
    ) -> None:
        self._generations = generations
        self._tokenizer = model.generator.tokenizer
        self._with_logprobs = body.logprobs is not None
        self._with_usage = _wants_usage(body)
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = body.model or model.files.name

    async def whole(self) -> CompletionAnswer:
        """Not streamed; choices in the order of the prompts."""
        pieces_of: list[list[Piece]] = [[] for _ in self._generations]
        async with aclosing(merged(self._generations)) as arriving:
            async for index, piece in arriving:
                pieces_of[index].append(piece)
        choices = [
            CompletionChoice(
                index,
                "".join(piece.text for piece in pieces),
                self._logprobs(pieces, 0),
                _FINISH[self._generations[index].finish or "length"],
            )
            for index, pieces in enumerate(pieces_of)
        ]
        return self._answer(choices, _usage(self._generations))

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Streamed, without [DONE]; the prompts' chunks come as they are drawn."""
        offsets = [0] * len(self._generations)
        async with aclosing(merged(self._generations)) as arriving:
            async for index, piece in arriving:
                if piece.text or piece.finish or self._with_logprobs:
                    finish = _FINISH[piece.finish] if piece.finish else None
                    logprobs = self._logprobs([piece], offsets[index])
                    choice = CompletionChoice(index, piece.text, logprobs, finish)
                    yield frame(self._answer([choice], None))
                offsets[index] += len(piece.text)
        if self._with_usage:
            yield frame(self._answer([], _usage(self._generations)))

    def _answer(self, choices: list[CompletionChoice], usage: Usage | None) -> CompletionAnswer:
        return CompletionAnswer(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, pieces: Sequence[Piece], offset: int) -> CompletionLogprobs | None:
        if not self._with_logprobs:
            return None
        text = self._tokenizer.token_text
        offsets: list[int] = []
        for piece in pieces:
            offsets.append(offset)
            offset += len(piece.text)
        return CompletionLogprobs(
            tokens=[text(piece.token.id) for piece in pieces],
            token_logprobs=[piece.token.logprob or 0.0 for piece in pieces],
            top_logprobs=[
                {
                    text(one): logprob
                    for one, logprob in zip(
                        piece.token.top_ids, piece.token.top_logprobs, strict=True
                    )
                }
                for piece in pieces
            ],
            text_offset=offsets,
        )


def _logprob(tokenizer: TextTokenizer, token: Token) -> TokenLogprob:
    text = tokenizer.token_text(token.id)
    tops = zip(token.top_ids, token.top_logprobs, strict=True)
    return TokenLogprob(
        text,
        token.logprob or 0.0,
        _bytes(text),
        [
            TopLogprob(top, logprob, _bytes(top))
            for top, logprob in ((tokenizer.token_text(one), p) for one, p in tops)
        ],
    )


def _bytes(text: str) -> list[int]:
    return list(text.encode("utf-8", "replace"))
