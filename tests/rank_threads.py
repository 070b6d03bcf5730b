"""Ranks as threads of one process: they meet and talk as processes would, and start at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch

from chipset.backends.conformance.session import make_launch
from chipset.backends.conformance.suite import small_model
from chipset.backends.options import EngineOptions, ParallelOptions
from chipset.backends.plugin import Launch
from chipset.backends.reference.rendezvous import serve
from chipset.plugins.cpu.plugin import CPUPlugin

T = TypeVar("T")
MEET_S = 30.0


def launches(size: int, address: str) -> list[Launch]:
    """One for each rank, with the groups "tensor" of all of them and "alone" of itself."""
    options = EngineOptions(parallel=ParallelOptions(tensor=size))
    plugin, model = CPUPlugin(), small_model()
    made = [
        make_launch(plugin, model, options, rank=rank, rendezvous=address) for rank in range(size)
    ]
    return [
        replace(launch, groups={**launch.groups, "alone": (rank,)})
        for rank, launch in enumerate(made)
    ]


def in_ranks(size: int, work: Callable[[Launch], T]) -> Sequence[T]:
    """What `work` returns on each rank; raises what the first of them raised."""
    store, address = serve(MEET_S)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(_work, work, launch) for launch in launches(size, address)]
        found = [future.result() for future in futures]
    del store
    return found


def _work(work: Callable[[Launch], T], launch: Launch) -> T:
    with torch.inference_mode():
        return work(launch)
