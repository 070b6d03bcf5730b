"""What generations stand on, as they see it: an engine and a tokenizer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from ..core.messages import Ready, Stats, Submit, Tokens
from ..core.text.chat import ChatTemplate
from ..core.text.detokenizer import Detokenizer


class Engine(Protocol):
    """The part of EngineClient that serves requests."""

    ready: Ready

    @property
    def stats(self) -> Stats | None:
        """The last that it told; None: none yet."""

    def generate(self, submit: Submit) -> AsyncGenerator[Tokens, None]:
        """See EngineClient.generate."""


class TextTokenizer(Protocol):
    """The part of core.text.tokenizer.Tokenizer that serves requests."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The model's own ends of text."""

    @property
    def chat_template(self) -> ChatTemplate | None:
        """None where the model has none."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`."""

    def is_special(self, token_id: int) -> bool:
        """Whether decoding for readers leaves it out."""

    def token_text(self, token_id: int) -> str:
        """One token alone."""

    def detokenizer(self, *, prompt: Sequence[int] = ()) -> Detokenizer:
        """A new one, that leaves special tokens out and goes on from `prompt`."""
