"""The end-to-end half of the conformance kit: an engine on a backend, beside an engine on cpu."""

from .suite import EngineSuite as EngineConformance

__all__ = ["EngineConformance"]
