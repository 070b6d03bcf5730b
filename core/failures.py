"""Errors of a start that cross a process border: told by one side, the same class again on the other."""

from __future__ import annotations

import traceback

from ..backends import errors as backend_errors
from ..backends.errors import ChipsetError
from . import errors as core_errors
from .errors import EngineDied
from .messages import StartFailed


def told(error: BaseException) -> StartFailed:
    """What the other side is told. To be called where `error` was caught."""
    return StartFailed(
        error=type(error).__name__,
        message=str(error) or type(error).__name__,
        exit_code=error.exit_code if isinstance(error, ChipsetError) else 1,
        traceback="".join(traceback.format_exception(error)),
    )


def heard(failed: StartFailed) -> ChipsetError:
    """The error as the same class here, its traceback as a note; what is none of ours becomes EngineDied."""
    kind: type[ChipsetError] = EngineDied
    for module in (core_errors, backend_errors):
        found = getattr(module, failed.error, None)
        if isinstance(found, type) and issubclass(found, ChipsetError):
            kind = found
    # a class with arguments of its own (TooLarge) is no error of starting
    error = (
        kind(failed.message)
        if kind.__init__ is ChipsetError.__init__
        else EngineDied(failed.message)
    )
    error.add_note(failed.traceback)
    return error
