"""Communication in a world of one rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..collectives import Collectives
from ..kv_cache import Cache
from ..plugin import Plugin
from ..step import F32, StepInputs
from .modules import Reader
from .suite import Suite, session, small_model
from .tokens import read_tokens

NUM_TOKENS = 5


class CollectivesSuite(Suite):
    """The collectives."""

    def test_a_sum_over_one_rank_is_what_it_gives(self, plugin: Plugin) -> None:
        self._check(plugin, lambda comm, x: comm.all_reduce(x, "tensor"))

    def test_the_parts_of_one_rank_are_the_whole(self, plugin: Plugin) -> None:
        self._check(plugin, lambda comm, x: comm.all_gather(x, "tensor", 1))
        self._check(plugin, lambda comm, x: comm.all_gather(x, "tensor", 0))

    def _check(self, plugin: Plugin, op: Callable[[Collectives, Tensor], Tensor]) -> None:
        values = torch.randn(NUM_TOKENS, 24, generator=torch.Generator().manual_seed(3))
        with session(plugin, small_model()) as opened:
            reader: Reader

            def compute(ids: Tensor, inputs: StepInputs, cache: Cache) -> tuple[Tensor, Cache]:  # noqa: ARG001
                mine = reader.get_buffer("values").index_select(0, ids)
                return op(opened.backend.comm, mine), cache

            reader = opened.reader(compute, {"values": values})
            found: F32 = read_tokens(opened, reader, range(NUM_TOKENS))
        np.testing.assert_array_equal(found, values.numpy())
