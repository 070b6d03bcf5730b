"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class StopMatch:
    """What a piece of text came to."""

    text_before: str
    """Text that can be sent: none of it is, or may yet become, part of a stop string."""
    matched: str | None = None
    """The stop string that ended the text; what was pushed after it is dropped."""


class StopStrings:
    """Finds the stop string that is complete first; of several that end together, the longest.

    So the result does not depend on how the text is cut into pieces. Time is linear in the text, whatever the number
    of stop strings (Aho-Corasick: a trie of them in which each node knows the longest suffix that is a node too).
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Raises InvalidRequest for an empty one."""
        if "" in strings:
            raise InvalidRequest("A stop string must not be empty.")
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for string in strings:
            self._add(string)
        self._fail = self._failures()
        self._node = 0
        self._held = ""
        self._is_done = False

    def push(self, text: str) -> StopMatch:
        """Take the next piece; after a match nothing more comes out."""
        if self._is_done:
            return StopMatch("")
        if not self._next[0]:
            return StopMatch(text)
        for position, char in enumerate(text, 1):
            self._node = self._step(self._node, char)
            matched = self._match[self._node]
            if matched is not None:
                seen = self._held + text[:position]
                self._held, self._is_done = "", True
                return StopMatch(seen[: len(seen) - len(matched)], matched)
        seen = self._held + text
        # The node is the longest end of the text that begins a stop string.
        safe = len(seen) - self._depth[self._node]
        self._held = seen[safe:]
        return StopMatch(seen[:safe])

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held, self._node = self._held, "", 0
        return held

    def _add(self, string: str) -> None:
        node = 0
        for char in string:
            if char not in self._next[node]:
                self._next[node][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._match.append(None)
            node = self._next[node][char]
        self._match[node] = string

    def _failures(self) -> list[int]:
        """For each node the longest proper suffix that is a node; shorter matches inside a node become its own."""
        fail = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                back = fail[node]
                while back and char not in self._next[back]:
                    back = fail[back]
                fail[child] = self._next[back].get(char, 0)
                self._match[child] = self._match[child] or self._match[fail[child]]
                queue.append(child)
        return fail

    def _step(self, node: int, char: str) -> int:
        while node and char not in self._next[node]:
            node = self._fail[node]
        return self._next[node].get(char, 0)
