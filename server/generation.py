"""From text to text, whatever the dialect: tokenize, submit, detokenize, find stop strings.

text or messages ──▶ ids ──▶ Submit ──▶ engine ──▶ Tokens ──▶ Piece, Piece, …
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from ..core.errors import InvalidRequest, RequestFailed, TemplateError
from ..core.messages import Submit, Tokens
from ..core.text.stop_strings import StopStrings
from .job import Finish, Job, Piece
from .limits import Limits
from .metrics import Metrics, RequestTimes
from .ports import Engine, TextTokenizer

INLINE_CHARS = 2048
"""Shorter text is tokenized on the event loop: a thread would cost more."""


class Generation:
    """One request, tokenized and checked, that runs when `pieces` is iterated. The counters grow meanwhile."""

    def __init__(self, job: Job, submit: Submit, generator: Generator, started: float) -> None:
        self.job = job
        self.num_prompt = len(submit.prompt)
        self.num_generated = 0
        self.num_cached = 0
        self.finish: Finish | None = None
        self.validated = time.monotonic()
        self.started = started
        self.first_token: float | None = None
        self.ended = self.validated
        self.max_new_tokens = submit.max_new_tokens
        self._submit = submit
        self._generator = generator

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """One a drawn token. Leaving early cancels the request: wrap it in contextlib.aclosing."""
        error: BaseException | None = None
        try:
            async with aclosing(self._drawn()) as pieces:
                async for piece in pieces:
                    yield piece
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.ended = time.monotonic()
            self._record(error)

    async def _drawn(self) -> AsyncGenerator[Piece, None]:
        tokenizer, job = self._generator.tokenizer, self.job
        # a completion goes on from its prompt, space or none; a chat answer begins anew
        before = self._submit.prompt if job.add_special_tokens else ()
        detokenizer = tokenizer.detokenizer(prompt=before)
        stops = StopStrings(list(job.stop_strings))
        async with aclosing(self._generator.engine.generate(self._submit)) as steps:
            async for step in steps:
                self._count(step)
                last = len(step.tokens) - 1
                for index, token in enumerate(step.tokens):
                    self.num_generated += 1
                    ends = step.finish_reason if index == last else None
                    raw = detokenizer.push(token.id)
                    if ends is not None:
                        raw += detokenizer.flush()
                    # an id that ends the text is no part of it
                    shown = "" if ends == "stop" and not job.native else raw
                    text, finish = self._scan(stops, shown, ends)
                    yield Piece(
                        token=token,
                        text=text,
                        raw=raw,
                        special=tokenizer.is_special(token.id),
                        finish=finish,
                    )
                    if finish is not None:
                        return
        raise RequestFailed("the engine ended the text without a reason")

    def _scan(self, stops: StopStrings, shown: str, ends: str | None) -> tuple[str, Finish | None]:
        """What may be shown now, and whether and why the text ends here."""
        if not self.job.stop_strings or self.num_generated < self.job.min_new_tokens:
            text, matched = shown, False
        else:
            match = stops.push(shown)
            text, matched = match.text_before, match.matched is not None
        if matched:
            self.finish = "stop"
        elif ends is not None:
            text += stops.flush()
            self.finish = "length" if ends == "length" else "eos"
        return text, self.finish

    def _count(self, step: Tokens) -> None:
        self.num_cached = max(self.num_cached, step.cached_tokens)
        if self.first_token is None:
            self.first_token = time.monotonic()

    def _record(self, error: BaseException | None) -> None:
        """Errors are counted where they are answered; here only ends and clients that left."""
        metrics = self._generator.metrics
        if self.finish is not None:
            metrics.finished(
                RequestTimes(
                    received=self.started,
                    validated=self.validated,
                    first_token=self.first_token or self.ended,
                    ended=self.ended,
                    num_prompt=self.num_prompt,
                    num_generated=self.num_generated,
                    max_new_tokens=self.max_new_tokens,
                )
            )
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            metrics.failed("dropped")


class Generator:
    """Makes generations of jobs, over one engine and its tokenizer."""

    def __init__(
        self, engine: Engine, tokenizer: TextTokenizer, limits: Limits, metrics: Metrics
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.limits = limits
        self.metrics = metrics
        self._ids = itertools.count(1)

    async def prepare(self, job: Job) -> Generation:
        """Check and tokenize. Raises InvalidRequest."""
        started = time.monotonic()
        limits = self.limits
        limits.check_stop(job.stop_strings)
        limits.check_sampling(job.sampling)
        limits.check_ids("stop_token_ids", job.stop_ids)
        ids = await self._prompt_ids(job)
        max_new = limits.check_lengths(len(ids), job.max_new_tokens, lenient=job.native)
        most = limits.max_total_tokens - len(ids) if max_new is None else max_new
        if job.min_new_tokens > most:
            raise InvalidRequest(f"`min_tokens` must be <= {most}, the most that can be drawn here")
        own = () if job.ignore_eos else tuple(self.tokenizer.eos_ids)
        submit = Submit(
            request_id=next(self._ids),
            prompt=ids,
            sampling=job.sampling,
            max_new_tokens=max_new,
            min_new_tokens=job.min_new_tokens,
            stop_ids=sorted({*own, *job.stop_ids}),
            # ids the user named end the text even where the model's own do not
            ignore_eos=job.ignore_eos and not job.stop_ids,
            of_drawn=job.native,
            cache_salt=job.cache_salt,
        )
        return Generation(job, submit, self, started)

    async def _prompt_ids(self, job: Job) -> list[int]:
        if isinstance(job.prompt, str):
            ids = await self._encode(job)
        else:
            self.limits.check_ids("prompt", job.prompt)
            ids = list(job.prompt)
        if job.truncate is not None:
            ids = ids[-job.truncate :]
        if not ids:
            raise InvalidRequest("`inputs` cannot be empty")
        return ids

    async def _encode(self, job: Job) -> list[int]:
        text = job.prompt
        assert isinstance(text, str)
        # what is cut to its end afterwards may be long; the body's limit bounds it
        if job.truncate is None:
            self.limits.check_text(text)
        if len(text) <= INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=job.add_special_tokens)
        return await asyncio.to_thread(
            self.tokenizer.encode, text, add_special_tokens=job.add_special_tokens
        )

    async def render(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """The prompt that the model's chat template makes. Raises TemplateError."""
        template = self.tokenizer.chat_template
        if template is None:
            raise TemplateError("this model has no chat template; use /v1/completions or /generate")
        return await asyncio.to_thread(template.render, list(messages), **options)


async def merged(
    generations: Sequence[Generation],
) -> AsyncGenerator[tuple[int, Piece], None]:
    """(index, piece) of several generations as they come. Wrap it in contextlib.aclosing."""
    if len(generations) == 1:
        async with aclosing(generations[0].pieces()) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue(maxsize=64)

    async def run(index: int) -> None:
        try:
            async with aclosing(generations[index].pieces()) as pieces:
                async for piece in pieces:
                    await arrived.put((index, piece))
        except Exception as error:  # handed to the reader, who raises it
            await arrived.put((index, error))
        else:
            await arrived.put((index, None))

    running = [asyncio.create_task(run(index)) for index in range(len(generations))]
    try:
        left = len(running)
        while left:
            index, item = await arrived.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield index, item
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
