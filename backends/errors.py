"""Errors of the contract.

ChipsetError                 everything this package raises on purpose
├── UnknownBackend           no plugin has that name
├── BackendUnavailable       the plugin is there, but this machine or installation cannot run it
├── PluginError              a plugin broke its side of the contract
├── Incompatible             an option that the user set cannot be honoured
├── TooLarge                 no bucket holds a shape; the scheduler makes the step smaller
└── UnexpectedCompile        a graph would have to be compiled after freeze()
"""

from __future__ import annotations

from typing import ClassVar, Literal


class ChipsetError(Exception):
    """The message is one line: the cause, then the cure. `exit_code` is what the command ends with."""

    exit_code: ClassVar[int] = 1
    """What the command ends with."""


class UnknownBackend(ChipsetError):
    """No plugin has the name that was asked for."""

    exit_code = 2


class BackendUnavailable(ChipsetError):
    """The backend cannot be used here; the message holds its reason."""

    exit_code = 11


class PluginError(ChipsetError):
    """A plugin broke its side of the contract."""

    exit_code = 11


class Incompatible(ChipsetError):
    """An option that the user set cannot be honoured: names the option, the choices and the cure."""

    exit_code = 12


Axis = Literal["rows", "tokens", "query", "context", "blocks", "logits"]


class TooLarge(ChipsetError):
    """No bucket holds this shape, or holding it would waste too much.

    The scheduler makes the step smaller along `axis`: on query each row is cut to `limit`; on tokens the last row
    to what is left; otherwise, and always without chunked_prefill, the last row is left out.
    """

    def __init__(self, axis: Axis, limit: int) -> None:
        super().__init__(f"{axis} above {limit}")
        self.axis: Axis = axis
        self.limit = limit


class UnexpectedCompile(ChipsetError):
    """A graph would have to be compiled after freeze(); names the bucket and what differs.

    Raised before compiling, so the cache stays usable.
    """
