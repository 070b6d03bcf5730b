"""Token ids of one answer to text, piece by piece, never cutting a character."""

from __future__ import annotations

from collections.abc import Sequence, Set

import tokenizers

_REPLACEMENT = "\ufffd"
_CONTEXT = 4
"""Ids before the ones being decoded; what follows them keeps its leading space."""
_MAX_WINDOW = 64


class Detokenizer:
    """The text of a growing list of ids: what push and flush return, put together, is decode of all of them.

    Only the last few ids are decoded again with each new one. `tokenizers`' own DecodeStream raises where bytes that
    made a character are followed by one that spoils them; this does not.

    Two things can change text that an id already had, and it is held back until they no longer can:
    - bytes at the end that are the beginning of a character: they show as one U+FFFD,
    - byte tokens (<0x0A>): a run of them is decoded together, all or nothing, so it must have ended.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        skipped_ids: Set[int] = frozenset(),
        byte_ids: Set[int] = frozenset(),
        prompt: Sequence[int] = (),
    ) -> None:
        """`skipped_ids` have no text. With `prompt`, the answer begins as it goes on from there (space or none)."""
        self._backend = backend
        self._skipped_ids = skipped_ids
        self._byte_ids = byte_ids
        plain = [item for item in prompt if item not in skipped_ids and item not in byte_ids]
        self._window = plain[-_CONTEXT:]
        """Ids that are decoded together: first those whose text is out, then those whose text is not."""
        self._num_out = len(self._decode())
        """Characters of the window's text that are out."""

    def push(self, token_id: int) -> str:
        """Text that this id completes; "" while it is held back."""
        if token_id in self._skipped_ids:
            return ""
        self._window.append(token_id)
        if token_id in self._byte_ids:
            return ""
        text = self._decode()
        is_open = text.endswith(_REPLACEMENT)
        end = max(self._num_out, len(text) - is_open)
        new = text[self._num_out : end]
        self._num_out = end
        if not is_open:
            self._shrink(1, is_open)
        elif len(self._window) > _MAX_WINDOW:
            # An open character has at most three bytes, so what comes before these cannot matter to it.
            self._shrink(2 * _CONTEXT, is_open)
        return new

    def flush(self) -> str:
        """What was held back, when no more ids come."""
        text = self._decode()
        new = text[self._num_out :]
        self._num_out = len(text)
        return new

    def _shrink(self, num_ids: int, is_open: bool) -> None:
        del self._window[:-num_ids]
        self._num_out = len(self._decode()) - is_open

    def _decode(self) -> str:
        return self._backend.decode(self._window, skip_special_tokens=False)
