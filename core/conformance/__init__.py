"""The end-to-end half of the conformance kit: an engine on a backend, beside an engine on cpu."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .suite import EngineConformance

__all__ = ["EngineConformance"]


def __getattr__(name: str) -> Any:
    # late, so that report.py can say that pytest is missing
    if name == "EngineConformance":
        from .suite import EngineConformance

        return EngineConformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
