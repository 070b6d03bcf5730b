"""Ranks that misunderstand each other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from chipset.backends.backend import Backend
from chipset.backends.capabilities import Capabilities
from chipset.backends.plugin import Launch, Plugin, Probe
from chipset.backends.reference.collectives import (
    GlooCollectives,
    PeerLost,
    RankCollectives,
    SingleRank,
    join,
    ordered_sum,
)
from chipset.backends.reference.runtime import HostRuntime
from chipset.backends.runtime import ErrorClass
from chipset.plugins.sim import watch
from chipset.plugins.sim.backend import SimBackend
from chipset.plugins.sim.gaudi import SimGaudiPlugin

from ..mutation import Mutation, importable_name
from ..reference_plugin import ReferencePlugin


class SumDoubled(SingleRank):
    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        return x + x


class PartsTwice(SingleRank):
    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        return torch.cat((x, x), dim)


class Broken(ReferencePlugin):
    """Ranks that talk as `collectives` does; a world of one is whole."""

    collectives: type[GlooCollectives]

    def __init__(self) -> None:
        super().__init__(collectives=self.join)

    def join(self, launch: Launch) -> RankCollectives:
        return self.collectives(launch) if launch.world_size > 1 else SingleRank()


class _LastLeftOut(GlooCollectives):
    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        return ordered_sum(self.gathered(x, group)[:-1])


class _Mean(GlooCollectives):
    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        return super().all_reduce(x, group) / self.size(group)


class _OwnFirst(GlooCollectives):
    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        if self.size(group) == 1:
            return x
        return ordered_sum(self.gathered(x, group).roll(-self.meetings[group].index, 0))


class _Backwards(GlooCollectives):
    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        return torch.cat(self.gathered(x, group).flip(0).unbind(), dim)


class _AlongRows(GlooCollectives):
    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        return super().all_gather(x, group, 0)


class _InPlace(GlooCollectives):
    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        return x.copy_(super().all_reduce(x, group))


class _OneBuffer(GlooCollectives):
    def __init__(self, launch: Launch) -> None:
        super().__init__(launch)
        self.buffers: dict[tuple[object, ...], Tensor] = {}

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        held = self.buffers.setdefault((x.shape, x.dtype), torch.empty_like(x))
        return held.copy_(super().all_reduce(x, group))


class _GroupIgnored(GlooCollectives):
    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        return super().all_reduce(x, "tensor")


class _LargeCut(GlooCollectives):
    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        total = x.reshape(-1).clone()
        total[: 1 << 18] = super().all_reduce(total[: 1 << 18], group)
        return total.reshape(x.shape)


class _StridesIgnored(GlooCollectives):
    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        dense = torch.empty(x.shape).stride()
        return super().all_gather(x.as_strided(x.shape, dense), group, dim)


class _PartsOfOne(GlooCollectives):
    def reduce_scatter(self, x: Tensor, group: str, dim: int) -> Tensor:
        return self.all_reduce(x, group).chunk(self.size(group), dim)[0]


class _Kept(GlooCollectives):
    def all_to_all(self, x: Tensor, group: str) -> Tensor:
        return x.clone()


class LastLeftOut(Broken):
    collectives = _LastLeftOut


class Mean(Broken):
    collectives = _Mean


class OwnFirst(Broken):
    collectives = _OwnFirst


class Backwards(Broken):
    collectives = _Backwards


class AlongRows(Broken):
    collectives = _AlongRows


class InPlace(Broken):
    collectives = _InPlace


class OneBuffer(Broken):
    collectives = _OneBuffer


class GroupIgnored(Broken):
    collectives = _GroupIgnored


class LargeCut(Broken):
    collectives = _LargeCut


class StridesIgnored(Broken):
    collectives = _StridesIgnored


class PartsOfOne(Broken):
    collectives = _PartsOfOne


class Kept(Broken):
    collectives = _Kept


class _Blames(HostRuntime):
    def classify(self, error: BaseException) -> ErrorClass:
        return "request" if isinstance(error, PeerLost) else super().classify(error)


class RequestBlamed(ReferencePlugin):
    def __init__(self) -> None:
        super().__init__(runtime=_Blames)


class _Unseen(RankCollectives):
    """Calls that write in place, past whoever records the step."""

    def __init__(self, host: RankCollectives) -> None:
        self.host = host

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        total = x + 0
        with _disable_current_modes(), watch.reading():
            total.copy_(self.host.all_reduce(total.cpu(), group))
        return total

    def all_gather(self, x: Tensor, group: str, dim: int) -> Tensor:
        whole = torch.cat([x] * self.host.size(group), dim)
        with _disable_current_modes(), watch.reading():
            whole.copy_(self.host.all_gather(x.cpu(), group, dim))
        return whole

    def close(self) -> None:
        self.host.close()


class _UnseenBackend(SimBackend):
    def __init__(self, launch: Launch) -> None:
        super().__init__(launch)
        if launch.world_size > 1:
            self.comm.close()
            self.comm = _Unseen(join(launch))


class Vanishing(SimGaudiPlugin):
    def capabilities(self, probe: Probe) -> Capabilities:
        talks = frozenset(("all_reduce", "all_gather"))
        return replace(super().capabilities(probe), collectives=talks)

    def create(self, launch: Launch) -> Backend:
        return _UnseenBackend(launch)


def _alone(name: str, mistake: str, collectives: type[SingleRank]) -> Mutation:
    def plugin() -> Plugin:
        return ReferencePlugin(collectives=lambda launch: collectives())

    return Mutation(name=name, area="collectives", mistake=mistake, plugin=plugin)


def _mutation(name: str, mistake: str, plugin: type[Plugin], *, kills: bool = False) -> Mutation:
    return Mutation(
        name=name,
        area="collectives",
        mistake=mistake,
        plugin=plugin,
        importable=importable_name(plugin),
        kills=kills,
    )


MUTATIONS: tuple[Mutation, ...] = (
    _alone("sum doubled", "one rank's part is added to itself", SumDoubled),
    _alone("parts twice", "one rank's part is gathered twice", PartsTwice),
    _mutation("rank left out", "the last rank's part is missing from sums", LastLeftOut),
    _mutation("mean for sum", "sums are divided by the number of ranks", Mean),
    _mutation("own part first", "each rank adds in another order, so bits differ", OwnFirst),
    _mutation("ranks backwards", "parts lie in the opposite order", Backwards),
    _mutation("parts along rows", "parts are joined along the first axis always", AlongRows),
    _mutation("sum over its input", "the sum overwrites what was handed in", InPlace),
    _mutation("one buffer", "the next sum of that shape overwrites the one before", OneBuffer),
    _mutation("group ignored", "all ranks are heard whatever the group", GroupIgnored),
    _mutation("large sums cut", "numbers behind the first buffer are not summed", LargeCut),
    _mutation("strides ignored", "tensors with gaps are read as if they had none", StridesIgnored),
    _mutation("scattered to one", "every rank gets the first part of the sum", PartsOfOne),
    _mutation("nothing exchanged", "what was meant for others comes back", Kept),
    _mutation("calls unseen", "calls run while a step is recorded, and never again", Vanishing),
    _mutation(
        "request blamed", "a lost rank counts as a request's fault", RequestBlamed, kills=True
    ),
)
