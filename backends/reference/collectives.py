"""Collectives of a world of one, and over gloo between processes that hold their tensors on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import ProcessGroupGloo

from ..collectives import Collectives
from ..errors import PluginError
from ..plugin import Launch
from .rendezvous import LOOPBACK, connect, is_loopback

MEET_S = 120.0
"""For the first meeting: others may still be importing, or compiling what they need."""
STEP_S = 8.0
"""For each exchange after that."""
NARROW = frozenset((torch.bfloat16, torch.float16))
"""Dtypes whose sums are made in float32 and rounded once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """The ranks of a group that have met."""

    index: int
    """Of this rank in the group."""
    size: int
    store: PrefixStore
    """For these ranks alone, and for this time that they met."""
    gloo: Any
    """A ProcessGroupGloo, of whose members torch's stubs know few."""

    def said_by_all(self, key: str, said: str) -> list[str]:
        """What each rank says under a key that is used once, in their order. Waits for all of them."""
        self.store.set(f"said/{key}/{self.index}", said)
        return [self.store.get(f"said/{key}/{rank}").decode() for rank in range(self.size)]


class PeerLost(PluginError):
    """Another rank did not answer in time, or hung up: what Runtime.classify calls device_lost."""


class RankCollectives(Collectives):
    """Collectives that know their groups and can leave them."""

    def size(self, group: str) -> int:  # noqa: ARG002
        """Ranks of `group`."""
        return 1

    def close(self) -> None:
        """Leave the groups; no call may follow."""


class SingleRank(RankCollectives):
    """Every sum has one term and every gather one part."""

    def all_reduce(self, x: Tensor, group: str) -> Tensor:  # noqa: ARG002
        """x"""
        return x

    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:  # noqa: ARG002
        """x"""
        return x

    def reduce_scatter(self, x: Tensor, group: str, dim: int) -> Tensor:  # noqa: ARG002
        """x"""
        return x

    def all_to_all(self, x: Tensor, group: str) -> Tensor:  # noqa: ARG002
        """x"""
        return x


class GlooCollectives(RankCollectives):
    """All members, on tensors of the CPU, eagerly; for a device see .operators.

    A sum gathers the parts of all ranks and adds them in the order of the ranks, those of 16 bits in float32 and
    rounded once: the same bits on each rank, however the network cuts and orders messages. Groups of one rank
    communicate with nobody and give x itself.
    """

    def __init__(self, launch: Launch, *, meet_s: float = MEET_S, step_s: float = STEP_S) -> None:
        """Waits until all ranks of all groups are here. Raises PeerLost where they are not after meet_s."""
        rank, address = launch.worker.rank, launch.rendezvous
        self._step = timedelta(seconds=step_s)
        self._sizes = {name: len(ranks) for name, ranks in launch.groups.items()}
        with _losing_peers(f"rank {rank} met nobody at {address} within {meet_s:g} s"):
            self._store = connect(address, meet_s)
            self.meetings = {
                name: self._meet(name, ranks, launch, timedelta(seconds=meet_s))
                for name, ranks in launch.groups.items()
                if len(ranks) > 1
            }
            """By the names of the groups of several ranks."""

    def size(self, group: str) -> int:
        """See RankCollectives.size."""
        return self._sizes[group]

    def close(self) -> None:
        """See RankCollectives.close."""
        for meeting in self.meetings.values():
            meeting.gloo.shutdown()
        self.meetings = {}

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        """See Collectives.all_reduce."""
        return x if self.size(group) == 1 else ordered_sum(self.gathered(x, group))

    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        """See Collectives.all_gather."""
        return x if self.size(group) == 1 else torch.cat(self.gathered(x, group).unbind(), dim)

    def reduce_scatter(self, x: Tensor, group: str, dim: int) -> Tensor:
        """See Collectives.reduce_scatter. The bits are those of all_reduce."""
        count = self.size(group)
        if count == 1:
            return x
        if x.shape[dim] % count:
            raise ValueError(f"{x.shape[dim]} entries cannot be cut into {count} equal parts")
        return ordered_sum(self.all_to_all(torch.stack(x.chunk(count, dim)), group))

    def all_to_all(self, x: Tensor, group: str) -> Tensor:
        """See Collectives.all_to_all."""
        if self.size(group) == 1:
            return x
        received, sent = torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous()
        if sent.numel():
            with self._talking(group) as gloo:
                gloo.alltoall_base(_bytes(received), _bytes(sent), [], []).wait()
        return received

    def send(self, x: Tensor, group: str, to: int) -> None:
        """See Collectives.send."""
        if x.numel():
            with self._talking(group) as gloo:
                gloo.send([_bytes(x.contiguous())], to, 0).wait(self._step)

    def receive(self, like: Tensor, group: str, source: int) -> Tensor:
        """See Collectives.receive."""
        received = torch.empty_like(like, memory_format=torch.contiguous_format)
        if received.numel():
            with self._talking(group) as gloo:
                gloo.recv([_bytes(received)], source, 0).wait(self._step)
        return received

    def gathered(self, x: Tensor, group: str) -> Tensor:
        """The parts of all ranks of a group of several, in their order: [ranks, *x.shape], a new tensor."""
        parts = torch.empty((self.size(group), *x.shape), dtype=x.dtype)
        if x.numel():
            with self._talking(group) as gloo:
                gloo._allgather_base(_bytes(parts), _bytes(x.contiguous())).wait()
        return parts

    def _meet(self, name: str, ranks: Sequence[int], launch: Launch, meet: timedelta) -> Meeting:
        rank, place = launch.worker.rank, f"{name}/{'-'.join(map(str, ranks))}"
        # a second backend of the same processes meets apart from the first
        times = self._store.add(f"{place}/joined by {rank}", 1)
        store = PrefixStore(f"{place}/{times}", self._store)
        index, size = ranks.index(rank), len(ranks)
        gloo = _gloo(store, index, size, meet, on_loopback=is_loopback(launch.rendezvous))
        gloo.barrier().wait()
        gloo.set_timeout(self._step)
        return Meeting(index=index, size=size, store=store, gloo=gloo)

    @contextmanager
    def _talking(self, group: str) -> Iterator[Any]:
        seconds = self._step.total_seconds()
        with _losing_peers(f"a rank of group {group!r} hung up or was silent for {seconds:g} s"):
            yield self.meetings[group].gloo


def join(launch: Launch) -> RankCollectives:
    """What a worker that holds its tensors on the host needs: GlooCollectives, or SingleRank for a world of one."""
    return GlooCollectives(launch) if launch.world_size > 1 else SingleRank()


def ordered_sum(parts: Tensor) -> Tensor:
    """Over axis 0, in its order."""
    wide = torch.float32 if parts.dtype in NARROW else parts.dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


def _gloo(
    store: PrefixStore, index: int, size: int, timeout: timedelta, *, on_loopback: bool
) -> Any:
    """A ProcessGroupGloo; across hosts by the interface that GLOO_SOCKET_IFNAME or the host's name says."""
    gloo: Any = ProcessGroupGloo
    if not on_loopback:
        return gloo(store, index, size, timeout)
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=LOOPBACK)]
    options._timeout = timeout
    return gloo(store, index, size, options)


def _bytes(contiguous: Tensor) -> Tensor:
    """gloo carries bytes, whatever they mean."""
    return contiguous.reshape(-1).view(torch.uint8)


@contextmanager
def _losing_peers(what: str) -> Iterator[None]:
    """Torch and gloo raise RuntimeError and its subclasses for all that goes wrong between processes."""
    try:
        yield
    except RuntimeError as error:
        cause = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
        raise PeerLost(f"{what} ({cause}); see what became of that process") from error
