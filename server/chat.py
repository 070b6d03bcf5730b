"""`chipset run`: a conversation in the terminal, with an engine of its own and no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import termios
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from ..backends.options import SamplingParams
from ..core.errors import InvalidRequest
from ..core.loading.resolve import find_model
from ..core.text.tokenizer import Tokenizer
from .background import in_background
from .client import EngineClient
from .console import Console
from .engine_process import COMMAND
from .generation import Generator
from .job import Job
from .launch import engine_launch
from .limits import Limits
from .metrics import Metrics
from .settings import ServerSettings

T = TypeVar("T")

EXITS = ("/exit", "/quit", "/bye")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """How `run` answers."""

    prompt: str | None
    """Answer this alone; None: ask for more and more."""
    system: str | None
    temperature: float
    seed: int | None
    max_new_tokens: int | None


async def chat(
    settings: ServerSettings, options: ChatOptions, command: Sequence[str] = COMMAND
) -> None:
    """Talk until /exit or the end of the input. Ctrl-C stops an answer, and without one the conversation."""
    console = Console()
    try:
        finding = partial(
            find_model, settings.model, revision=settings.revision, progress=console.progress
        )
        files = await in_background(finding)
        tokenizer = await in_background(partial(Tokenizer.load, files))
        launch = engine_launch(settings, files)
        async with EngineClient.start(launch, console.progress, command) as client:
            console.end_progress()
            limits = Limits.derive(settings, client.ready, tokenizer.vocab_size)
            metrics = Metrics(lambda: client.stats, lambda: files.name)
            generator = Generator(client, tokenizer, limits, metrics)
            conversation = Conversation(generator, options, console)
            if options.prompt is not None:
                await conversation.answer(options.prompt)
                return
            if sys.stdin.isatty():
                console.note(f"{files.name} on {client.ready.backend}. /exit ends, Ctrl-C stops.")
            with _terminal_kept():
                await conversation.go_on()
    finally:
        console.end_progress()


class Conversation:
    """The turns so far, and the next one."""

    def __init__(self, generator: Generator, options: ChatOptions, console: Console) -> None:
        self._generator = generator
        self._console = console
        self._options = options
        self._messages: list[dict[str, str]] = []
        if options.system is not None:
            self._messages.append({"role": "system", "content": options.system})

    async def go_on(self) -> None:
        """Ask and answer until the person ends it."""
        while True:
            try:
                line = (await _interruptible(in_background(_ask))).strip()
            except (EOFError, Interrupted):
                if sys.stdin.isatty():
                    self._console.say("\n")
                return
            if line in EXITS:
                return
            if not line:
                continue
            try:
                await _interruptible(self.answer(line))
            except Interrupted:
                self._console.say("\n")
            except InvalidRequest as error:
                self._console.note(f"chipset: error: {error}")

    async def answer(self, text: str) -> None:
        """One turn, printed as it comes; what was said before an interruption stays in the history."""
        messages = [*self._messages, {"role": "user", "content": text}]
        prompt = await self._generator.render(messages, add_generation_prompt=True)
        job = Job(
            prompt=prompt,
            sampling=SamplingParams(temperature=self._options.temperature, seed=self._options.seed),
            max_new_tokens=self._options.max_new_tokens,
            add_special_tokens=False,
        )
        generation = await self._generator.prepare(job)
        said: list[str] = []
        try:
            async with aclosing(generation.pieces()) as pieces:
                async for piece in pieces:
                    said.append(piece.text)
                    self._console.say(piece.text)
            self._console.say("\n")
        finally:
            if said:
                messages.append({"role": "assistant", "content": "".join(said)})
                self._messages = messages


class Interrupted(Exception):
    """Ctrl-C."""


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which a Ctrl-C cancels. Raises Interrupted."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        if task.cancelled():
            raise Interrupted from None
        raise
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextlib.contextmanager
def _terminal_kept() -> Iterator[None]:
    """Leave the terminal as it was: line editing that is cut off in the middle does not."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _ask() -> str:
    """The next line; runs in a thread."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - editing and history of input()
    return input(">>> ")
