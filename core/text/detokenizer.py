"""Token ids of one answer to text, piece by piece, never cutting a character."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The text of a growing list of ids: all that push and flush return is decode of all ids."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, skip_special_tokens: bool, prompt: Sequence[int]
    ) -> None:
        self._backend = backend
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=skip_special_tokens)

    def push(self, token_id: int) -> str:
        """Text that this id completes; "" while a character is incomplete."""
        return self._stream.step(self._backend, token_id) or ""

    def flush(self) -> str:
        """What is left of an incomplete character."""
        return ""
