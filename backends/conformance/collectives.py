"""Communication: in a world of one, under SPMD, and between processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from ..capabilities import Capabilities
from ..collectives import Collectives
from ..errors import Incompatible
from ..kv_cache import Cache
from ..options import EngineOptions, ParallelOptions
from ..plugin import Plugin
from ..step import F32, StepInputs
from . import exchanges
from .modules import Reader
from .ranks import Finding, run_world
from .suite import Suite, session, small_model
from .tokens import read_tokens

NUM_TOKENS = 5
QUICK_SIZE = 4
"""Of the only world in the quick selection: sums of two have one order, whoever makes them."""
SIZES = (2, QUICK_SIZE)
NEEDS: Mapping[str, str] = {
    "scattered": "reduce_scatter",
    "exchanged": "all_to_all",
    "passed_on": "send_receive",
}
"""Exchanges that take more than all_reduce and all_gather, and what they take."""
ALWAYS = ("sums", "gathers", "large", "repeated", "interleaved", "kept", "grouped", "replayed")
Worlds = dict[int, Mapping[str, Sequence[Finding]]]
"""By size what each exchange gave. A world is started once, and runs them all."""

in_worlds = pytest.mark.parametrize("size", SIZES)


class CollectivesSuite(Suite):
    """The collectives."""

    importable: ClassVar[str] = ""
    """For suites that override make_plugin: module:attribute of what makes the plugin in other processes."""
    folders: ClassVar[Sequence[str]] = ()
    """Where that module is found, beside sys.path."""

    @pytest.fixture(scope="class")
    @classmethod
    def worlds(cls) -> Worlds:
        """Of this suite, as far as they have run."""
        return {}

    def test_a_sum_over_one_rank_is_what_it_gives(self, plugin: Plugin) -> None:
        self._check_identity(plugin, 1, lambda comm, x: comm.all_reduce(x, "tensor"))

    def test_the_parts_of_one_rank_are_the_whole(self, plugin: Plugin) -> None:
        self._check_identity(plugin, 1, lambda comm, x: comm.all_gather(x, "tensor", 1))
        self._check_identity(plugin, 1, lambda comm, x: comm.all_gather(x, "tensor", 0))

    def test_a_worker_of_several_devices_has_nobody_to_talk_to(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        self.require("all_reduce" in capabilities.collectives, "it claims no all_reduce")
        workers = self._plan_or_skip(plugin, 2)
        self.require(workers == 1, "each device has a worker of its own")
        self._check_identity(plugin, 2, lambda comm, x: comm.all_reduce(x, "tensor"))
        self._check_identity(plugin, 2, lambda comm, x: comm.all_gather(x, "tensor", 1))

    @in_worlds
    def test_sums_are_right_and_of_the_same_bits_on_every_rank(
        self, plugin: Plugin, capabilities: Capabilities, worlds: Worlds, size: int
    ) -> None:
        self._check("sums", plugin, capabilities, worlds, size)

    @in_worlds
    def test_parts_lie_in_the_order_of_the_ranks(
        self, plugin: Plugin, capabilities: Capabilities, worlds: Worlds, size: int
    ) -> None:
        self._check("gathers", plugin, capabilities, worlds, size)

    @in_worlds
    def test_large_tensors_arrive_whole(
        self, plugin: Plugin, capabilities: Capabilities, worlds: Worlds, size: int
    ) -> None:
        self._check("large", plugin, capabilities, worlds, size)

    @in_worlds
    def test_a_thousand_calls_are_each_of_their_own_numbers(
        self, plugin: Plugin, capabilities: Capabilities, worlds: Worlds, size: int
    ) -> None:
        self._check("repeated", plugin, capabilities, worlds, size)

    @in_worlds
    def test_members_may_take_turns(
        self, plugin: Plugin, capabilities: Capabilities, worlds: Worlds, size: int
    ) -> None:
        self._check("interleaved", plugin, capabilities, worlds, size)

    @in_worlds
    def test_results_are_new_tensors_and_stay_as_they_are(
        self, plugin: Plugin, capabilities: Capabilities, worlds: Worlds, size: int
    ) -> None:
        self._check("kept", plugin, capabilities, worlds, size)

    @in_worlds
    def test_a_group_hears_its_own_ranks_only(
        self, plugin: Plugin, capabilities: Capabilities, worlds: Worlds, size: int
    ) -> None:
        self._check("grouped", plugin, capabilities, worlds, size)

    @in_worlds
    def test_a_step_that_runs_again_communicates_again(
        self, plugin: Plugin, capabilities: Capabilities, worlds: Worlds, size: int
    ) -> None:
        self._check("replayed", plugin, capabilities, worlds, size)

    @in_worlds
    def test_a_scattered_sum_is_cut_in_the_order_of_the_ranks(
        self, plugin: Plugin, capabilities: Capabilities, worlds: Worlds, size: int
    ) -> None:
        self._check("scattered", plugin, capabilities, worlds, size)

    @in_worlds
    def test_each_rank_gets_what_the_others_have_for_it(
        self, plugin: Plugin, capabilities: Capabilities, worlds: Worlds, size: int
    ) -> None:
        self._check("exchanged", plugin, capabilities, worlds, size)

    @in_worlds
    def test_what_a_rank_sends_the_other_receives(
        self, plugin: Plugin, capabilities: Capabilities, worlds: Worlds, size: int
    ) -> None:
        self._check("passed_on", plugin, capabilities, worlds, size)

    @in_worlds
    def test_a_rank_that_is_lost_is_noticed(
        self, plugin: Plugin, capabilities: Capabilities, worlds: Worlds, size: int
    ) -> None:
        self._check(self._end(size), plugin, capabilities, worlds, size)

    def _check(
        self, exchange: str, plugin: Plugin, able: Capabilities, worlds: Worlds, size: int
    ) -> None:
        """The findings of one exchange; starts the world of that size where it has not run yet."""
        if size != QUICK_SIZE:
            self.thorough()
        needed = {"all_reduce", "all_gather", NEEDS.get(exchange, "all_reduce")}
        missing = ", ".join(sorted(needed - able.collectives))
        self.require(not missing, f"it claims no {missing}")
        name = self.backend or self.importable
        self.require(name, "nothing says how other processes find this plugin; set `importable`")
        workers = self._plan_or_skip(plugin, size)
        self.require(workers == size, "one worker drives all devices")
        if size not in worlds:
            claimed = [name for name, needs in NEEDS.items() if needs in able.collectives]
            checks = [f"{exchanges.__name__}:{c}" for c in (*ALWAYS, *claimed, self._end(size))]
            made = run_world(
                plugin, [name], size, checks, is_quick=self.is_quick, folders=self.folders
            )
            worlds[size] = made[name]
        findings = worlds[size].get(f"{exchanges.__name__}:{exchange}", ())
        self.require(findings, "left out of this world")
        errors = [f"rank {rank}: {f.error}" for rank, f in enumerate(findings) if f.error]
        assert not errors, "; ".join(errors)
        assert len({finding.bits for finding in findings}) == 1, "ranks hold unequal bits"

    def _end(self, size: int) -> str:
        """How a world of that size ends: whoever hangs is waited for."""
        return "dying" if self.is_quick or size == min(SIZES) else "hanging"

    def _plan_or_skip(self, plugin: Plugin, size: int) -> int:
        """How many workers a model in so many shards gets."""
        try:
            return len(plugin.worker_plan(ParallelOptions(tensor=size), [plugin.probe()]))
        except Incompatible as error:
            pytest.skip(f"no world of {size}: {error}")

    def _check_identity(
        self, plugin: Plugin, num_shards: int, op: Callable[[Collectives, Tensor], Tensor]
    ) -> None:
        values = torch.randn(NUM_TOKENS, 24, generator=torch.Generator().manual_seed(3))
        options = EngineOptions(parallel=ParallelOptions(tensor=num_shards))
        with session(plugin, small_model(), options) as opened:
            reader: Reader

            def compute(ids: Tensor, inputs: StepInputs, cache: Cache) -> tuple[Tensor, Cache]:  # noqa: ARG001
                mine = reader.get_buffer("values").index_select(0, ids)
                return op(opened.backend.comm, mine), cache

            reader = opened.reader(compute, {"values": values})
            found: F32 = read_tokens(opened, reader, range(NUM_TOKENS))
        np.testing.assert_array_equal(found, values.numpy())
