"""A mutation: one mistake that a plugin could make, and the plugin that makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from chipset.backends.plugin import Plugin

Area = Literal[
    "attention",
    "collectives",
    "kv_cache",
    "shapes",
    "steps",
    "sampling",
    "ops",
    "linear",
    "quantization",
    "plugin",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """A broken plugin, which the suites of its area must catch."""

    name: str
    """Short, of words: "window off by one"."""
    area: Area
    mistake: str
    """What the plugin does wrong, as one clause: what a row, a key or a draw then gets."""
    plugin: Callable[[], Plugin]
    importable: str = ""
    """How other processes find it, where mistakes take several ranks: module:attribute."""
    kills: bool = False
    """Whether it shows when a rank dies, so that its processes run no other plugin."""


def importable_name(thing: Callable[..., object]) -> str:
    """Of a class or function of a module."""
    return f"{thing.__module__}:{thing.__qualname__}"
