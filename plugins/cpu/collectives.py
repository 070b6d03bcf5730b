"""Communication on the CPU: one process uses all cores, so there is nobody to talk to."""

from ...backends.reference.collectives import SingleRank

__all__ = ["SingleRank"]
