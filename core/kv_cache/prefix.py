"""Content keys of KV blocks: a sha256 chain, so that equal keys mean equal text from the start."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def root_key(salt: str) -> bytes:
    """The parent of a text's first block. Texts of different salt share nothing."""
    return hashlib.sha256(b"chipset" + salt.encode()).digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block that holds `tokens` after the blocks that `parent` stands for."""
    return hashlib.sha256(parent + array("i", tokens).tobytes()).digest()


def extend_keys(keys: list[bytes], tokens: Sequence[int], block_size: int, salt: str) -> None:
    """Append to `keys` those of the full blocks of `tokens` that it lacks."""
    for first in range(len(keys) * block_size, len(tokens) - block_size + 1, block_size):
        parent = keys[-1] if keys else root_key(salt)
        keys.append(block_key(parent, tokens[first : first + block_size]))
