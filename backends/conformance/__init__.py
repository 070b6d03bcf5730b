"""A kit of tests that any backend can be held to, through the contract alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kit import BackendConformance

__all__ = ["BackendConformance"]


def __getattr__(name: str) -> Any:
    # late, so that run.py can say that pytest is missing
    if name == "BackendConformance":
        from .kit import BackendConformance

        return BackendConformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
