"""Communication on the CPU: ranks of one host through memory that they share, all others over gloo."""

from __future__ import annotations

import logging

from torch import Tensor

from ...backends.plugin import Launch
from ...backends.reference.collectives import GlooCollectives, RankCollectives, SingleRank
from ...backends.reference.native import NativeLibrary
from .shared_memory import SharedMemory, meet

_log = logging.getLogger(__name__)


class CPUCollectives(GlooCollectives):
    """all_reduce and all_gather through shared memory in groups that can have it; the same bits as over gloo."""

    def __init__(self, launch: Launch, library: NativeLibrary | None = None) -> None:
        super().__init__(launch)
        self.memories: dict[str, SharedMemory] = {}
        """By group."""
        self.reasons: dict[str, str] = {}
        """Why a group has none."""
        for group, meeting in self.meetings.items():
            hosts = meeting.said_by_all("host", str(launch.worker.host))
            found = meet(meeting, library=library) if len(set(hosts)) == 1 else "several hosts"
            if isinstance(found, SharedMemory):
                self.memories[group] = found
                continue
            self.reasons[group] = found
            if meeting.index == 0:
                _log.warning("ranks of group %s talk over gloo, which is slow: %s", group, found)

    def close(self) -> None:
        """See RankCollectives.close."""
        self.memories = {}
        super().close()

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        """See Collectives.all_reduce."""
        memory = self.memories.get(group)
        return super().all_reduce(x, group) if memory is None else memory.all_reduce(x)

    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        """See Collectives.all_gather."""
        memory = self.memories.get(group)
        return super().all_gather(x, group, dim) if memory is None else memory.all_gather(x, dim)


def join(launch: Launch) -> RankCollectives:
    """What this worker needs."""
    return CPUCollectives(launch) if launch.world_size > 1 else SingleRank()
