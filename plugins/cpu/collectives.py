"""Communication on the CPU."""

from ...backends.reference.collectives import RankCollectives, join

__all__ = ["RankCollectives", "join"]
