"""Nodes: what torchrun said of the processes that it started, of which rank 0 serves and the others are workers.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..backends.errors import Incompatible
from ..backends.options import EngineOptions, ParallelOptions
from ..backends.plugin import Probe

KEY = "chipset/engine"
"""In the launcher's store: the Offer of the engine that there is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """One process of several, on hosts that are alike."""

    rank: int
    num_ranks: int
    ranks_per_host: int
    address: str
    port: int
    """Of the launcher's TCPStore, on rank 0's host."""

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Nodes | None:
        """None where nothing was started by torchrun, or only one process."""
        if "TORCHELASTIC_RUN_ID" not in environment or environment.get("WORLD_SIZE", "1") == "1":
            return None
        return cls(
            rank=int(environment["RANK"]),
            num_ranks=int(environment["WORLD_SIZE"]),
            ranks_per_host=int(environment["LOCAL_WORLD_SIZE"]),
            address=environment["MASTER_ADDR"],
            port=int(environment["MASTER_PORT"]),
        )

    def hosts(self, probe: Probe) -> list[Probe]:
        """By index; each is taken to be like the one that was probed."""
        count = self.num_ranks // self.ranks_per_host
        return [replace(probe, num_devices=self.ranks_per_host)] * count

    def options(self, options: EngineOptions) -> EngineOptions:
        """With one rank for each process. Raises Incompatible where the user asked for another number."""
        asked = options.parallel.tensor
        if asked not in (1, self.num_ranks):
            raise Incompatible(
                f"--num-shard {asked}: torchrun started {self.num_ranks} processes; "
                "leave it out, or start as many"
            )
        return replace(options, parallel=ParallelOptions(tensor=self.num_ranks))
