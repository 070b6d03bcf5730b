"""What ranks of a world do together, each function on every rank at once; see .ranks.

Values are normal numbers where sums may be rounded, and small integers, of which all sums are exact, where the question
is who heard whom. Values are looked at once all exchanges of a function are over: a rank that stopped at a wrong one
would leave the others waiting.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..collectives import Collectives
from ..kv_cache import Cache
from ..reference.dtypes import torch_dtype
from ..step import F32, StepInputs
from .modules import Reader
from .ranks import Op, Rank
from .tokens import read_tokens
from .tolerance import excess

GROUP, PAIR = "tensor", "pair"
SHAPES = ((1,), (7,), (5, 3), (2, 3, 4), (64, 33))
LARGE = (2, 150_000)
"""More numbers than buffers for small messages hold."""
LOST_S = 10.0
"""Until a lost rank must have been noticed."""


def sums(rank: Rank) -> Sequence[F32]:
    """Of every dtype and shape, and of a tensor with gaps."""
    cases = [
        (dtype, shape, _normal(rank, shape, dtype))
        for dtype in sorted(rank.session.launch.capabilities.dtypes)
        for shape in SHAPES
    ]
    found = [rank.exchange(_reduce, parts[rank.number]) for _, _, parts in cases]
    grid = _normal(rank, (4, 9), "float32")
    cut = rank.exchange(lambda comm, x: _reduce(comm, _parts(x, 3, 1)[1]), grid[rank.number])
    for summed, (dtype, shape, parts) in zip(found, cases, strict=True):
        _expect(summed, _total(parts), dtype, f"the sum of {dtype} {list(shape)}")
    _expect(cut, _total(grid)[:, 3:6], "float32", "the sum of tensors with gaps")
    return [*found, cut]


def gathers(rank: Rank) -> Sequence[F32]:
    """Of every dtype and shape, along every axis, and of a tensor with gaps."""
    cases = [
        (dtype, shape, dim, _normal(rank, shape, dtype))
        for dtype in sorted(rank.session.launch.capabilities.dtypes)
        for shape in SHAPES
        for dim in range(len(shape))
    ]
    found = [rank.exchange(_gather_along(dim), parts[rank.number]) for _, _, dim, parts in cases]
    grid = _normal(rank, (4, 9), "float32")
    cut = rank.exchange(
        lambda comm, x: comm.all_gather(_parts(x, 3, 1)[1], GROUP, 1), grid[rank.number]
    )
    for whole, (dtype, shape, dim, parts) in zip(found, cases, strict=True):
        what = f"the parts of {dtype} {list(shape)} along {dim}"
        _expect_exactly(whole, torch.cat(parts, dim), what)
    middle = torch.cat([part[:, 3:6] for part in grid], 1)
    _expect_exactly(cut, middle, "the parts of tensors with gaps")
    return [*found, cut]


def large(rank: Rank) -> Sequence[F32]:
    """More than a megabyte."""
    parts = _integers(rank, LARGE)

    def weighed(comm: Collectives, x: Tensor) -> Tensor:
        first, *others = _parts(comm.all_gather(x, GROUP, 0), LARGE[0], 0)
        for number, part in enumerate(others, 2):
            first = first + part * number
        return first

    summed = rank.exchange(_reduce, parts[rank.number])
    found = rank.exchange(weighed, parts[rank.number])
    _expect_exactly(summed, sum(parts, torch.zeros(LARGE)), "the sum of large tensors")
    wanted = torch.zeros(LARGE)
    for number, part in enumerate(parts, 1):
        wanted += part * number
    _expect_exactly(found, wanted, "the parts of large tensors")
    return [summed, found]


def repeated(rank: Rank) -> Sequence[F32]:
    """A thousand sums (a hundred in the quick selection), each of other numbers, by steps that are run again."""
    loops = 50

    def op(comm: Collectives, x: Tensor) -> Tensor:
        total = x * 0
        for number in range(1, loops + 1):
            total = total + _reduce(comm, x * number)
        return total

    parts = _integers(rank, (33,))
    found = rank.exchange(op, parts[rank.number], times=2 if rank.is_quick else 20)
    wanted = sum(parts, torch.zeros(33)) * (loops * (loops + 1) // 2)
    _expect_exactly(found, wanted, "sums in a long row")
    return [found]


def interleaved(rank: Rank) -> Sequence[F32]:
    """Members by turns, each of what the one before gave."""

    def op(comm: Collectives, x: Tensor) -> Tensor:
        whole = comm.all_gather(_reduce(comm, x) + x, GROUP, 1)
        return comm.all_gather(_reduce(comm, whole), GROUP, 0)

    parts = _integers(rank, (2, 3))
    total = sum(parts, torch.zeros(2, 3))
    whole = torch.cat([total + part for part in parts], 1) * rank.size
    found = rank.exchange(op, parts[rank.number])
    _expect_exactly(found, torch.cat([whole] * rank.size, 0), "members by turns")
    return [found]


def kept(rank: Rank) -> Sequence[F32]:
    """What came of one call stays while others run, and so does what was handed in."""

    def op(comm: Collectives, x: Tensor) -> Tensor:
        mine = x * 1
        first = _reduce(comm, mine)
        second = _reduce(comm, mine * 2)
        third = _parts(comm.all_gather(mine, GROUP, 0), 3, 0)[0]
        fourth = _parts(comm.all_gather(mine * 3, GROUP, 0), 3, 0)[0]
        return mine + first * 8 + second * 64 + third * 512 + fourth * 4096

    parts = _integers(rank, (3, 5))
    total = sum(parts, torch.zeros(3, 5))
    wanted = parts[rank.number] + total * (8 + 128) + parts[0] * (512 + 3 * 4096)
    found = rank.exchange(op, parts[rank.number])
    _expect_exactly(found, wanted, "tensors after later calls")
    return []


def grouped(rank: Rank) -> Sequence[F32]:
    """Two groups by turns: all ranks, and pairs of neighbours (one may be left alone)."""

    def op(comm: Collectives, x: Tensor) -> Tensor:
        near = comm.all_reduce(x, PAIR)
        return _reduce(comm, near) + comm.all_reduce(near, PAIR) * 1000

    parts = _integers(rank, (3, 2))
    nears = [_of_pair(parts, number) for number in range(rank.size)]
    near = _of_pair(nears, rank.number)
    found = rank.exchange(op, parts[rank.number])
    _expect_exactly(found, sum(nears, torch.zeros(3, 2)) + near * 1000, "sums of two groups")
    return []


def scattered(rank: Rank) -> Sequence[F32]:
    """reduce_scatter along both axes."""
    parts = _normal(rank, (2 * rank.size, 3 * rank.size), "float32")
    found = [rank.exchange(_scatter_along(dim), parts[rank.number]) for dim in range(2)]
    for dim, part in enumerate(found):
        wanted = np.split(_total(parts), rank.size, dim)[rank.number]
        _expect(part, wanted, "float32", f"the part of the sum along {dim}")
    return []


def exchanged(rank: Rank) -> Sequence[F32]:
    """all_to_all."""
    parts = _normal(rank, (rank.size, 2, 3), "float32")
    found = rank.exchange(lambda comm, x: comm.all_to_all(x, GROUP), parts[rank.number])
    wanted = torch.stack([part[rank.number] for part in parts])
    _expect_exactly(found, wanted, "what all others had for this rank")
    return []


def passed_on(rank: Rank) -> Sequence[F32]:
    """send and receive, around a ring, twice."""
    sent = [_integers(rank, (3, 4 + turn)) for turn in range(2)]
    got = [_passed(rank, parts[rank.number]) for parts in sent]
    for device, parts in zip(got, sent, strict=True):
        wanted = parts[(rank.number - 1) % rank.size]
        _expect_exactly(rank.read(device), wanted, "what the rank before sent")
    return []


@torch.inference_mode()
def _passed(rank: Rank, x: Tensor) -> Tensor:
    """x goes to the next rank; what the one before sent, on the device."""
    following, before = (rank.number + 1) % rank.size, (rank.number - 1) % rank.size
    put = rank.session.backend.runtime.put
    mine, like = put(x), put(torch.zeros_like(x))
    if rank.number % 2 == 0:
        rank.comm.send(mine, GROUP, following)
        return rank.comm.receive(like, GROUP, before)
    got = rank.comm.receive(like, GROUP, before)
    rank.comm.send(mine, GROUP, following)
    return got


def replayed(rank: Rank) -> Sequence[F32]:
    """Steps of one shape with other tokens: a graph that runs again must communicate again."""
    parts = _integers(rank, (8, 6))
    reader: Reader

    def compute(ids: Tensor, inputs: StepInputs, cache: Cache) -> tuple[Tensor, Cache]:  # noqa: ARG001
        mine = reader.get_buffer("values").index_select(0, ids)
        total = _reduce(rank.comm, mine)
        return rank.comm.all_gather(mine * 100 + total, GROUP, 1), cache

    reader = rank.session.reader(compute, {"values": parts[rank.number]})
    total = sum(parts, torch.zeros(8, 6))
    wanted = torch.cat([part * 100 + total for part in parts], 1)
    steps = ([1], [2], [5], [1], [7])
    found = [read_tokens(rank.session, reader, tokens) for tokens in steps]
    for values, tokens in zip(found, steps, strict=True):
        _expect_exactly(values, wanted[tokens], f"the step of token {tokens[0]}")
    return found


def dying(rank: Rank) -> Sequence[F32]:
    """The last rank ends without a word; the others must not wait for it."""
    rank.exchange(_reduce, torch.ones(3))
    if rank.number == rank.size - 1:
        rank.store.set("dying", "now")
        rank.die()
    rank.store.get("dying")
    _lose(rank)
    return []


def hanging(rank: Rank) -> Sequence[F32]:
    """The last rank stays away from a call; the others must not wait for it."""
    rank.exchange(_reduce, torch.ones(3))
    if rank.number == rank.size - 1:
        time.sleep(LOST_S)
    else:
        _lose(rank)
    return []


def _lose(rank: Rank) -> None:
    began = time.monotonic()
    meaning = "nothing"
    try:
        rank.exchange(_reduce, torch.ones(3))
    except Exception as error:  # of whatever class, the runtime must know it
        meaning = rank.session.backend.runtime.classify(error)
    seconds = time.monotonic() - began
    assert meaning == "device_lost", f"a sum without one of its ranks raised {meaning}"
    assert seconds < LOST_S, f"a lost rank was noticed after {seconds:.1f} s"


def _reduce(comm: Collectives, x: Tensor) -> Tensor:
    return comm.all_reduce(x, GROUP)


def _gather_along(dim: int) -> Op:
    return lambda comm, x: comm.all_gather(x, GROUP, dim)


def _scatter_along(dim: int) -> Op:
    return lambda comm, x: comm.reduce_scatter(x, GROUP, dim)


def _parts(x: Tensor, size: int, dim: int) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = x.split(size, dim)  # type: ignore[no-untyped-call]
    return parts


def _normal(rank: Rank, shape: Sequence[int], dtype: str) -> list[Tensor]:
    """The part of every rank: each knows all of them."""
    return [
        torch.randn(*shape, generator=_generator(number)).to(torch_dtype(dtype))
        for number in range(rank.size)
    ]


def _integers(rank: Rank, shape: Sequence[int]) -> list[Tensor]:
    """The part of every rank, of numbers 0 to 7."""
    return [
        torch.randint(8, tuple(shape), generator=_generator(number)).float()
        for number in range(rank.size)
    ]


def _generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + number)


def _total(parts: Sequence[Tensor]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = torch.stack([part.double() for part in parts]).sum(0).numpy()
    return total


def _of_pair(parts: Sequence[Tensor], number: int) -> Tensor:
    first = number // 2 * 2
    return sum(parts[first : first + 2], torch.zeros_like(parts[0]))


def _expect(found: F32, wanted: NDArray[np.float64], dtype: str, what: str) -> None:
    assert found.shape == wanted.shape, f"{what} is {list(found.shape)}, not {list(wanted.shape)}"
    error = excess(found, wanted, dtype)
    assert error <= 1, f"{what} is wrong by {error:.3g} times what {dtype} allows"


def _expect_exactly(found: F32, wanted: Tensor, what: str) -> None:
    shape = list(wanted.shape)
    assert list(found.shape) == shape, f"{what} is {list(found.shape)}, not {shape}"
    wrong = int((found != wanted.float().numpy()).sum())
    assert not wrong, f"{what}: {wrong} of {found.size} numbers are wrong"
