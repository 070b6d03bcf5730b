"""Many ranks give the text of one: workers in processes of their own, over the backend's own collectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

from ...backends.capabilities import Capabilities
from ...backends.conformance.suite import Suite
from ...backends.errors import Incompatible
from ...backends.options import EngineOptions, ParallelOptions
from ...backends.plugin import Plugin
from ...backends.registry import Registry
from ..files import ModelFiles
from ..plan import NEEDED
from .checkpoint import FULL, MOE, UNEVEN, make_checkpoint
from .engines import compare, running
from .traffic import Answer, Arrival, random_traffic, serve

KINDS = MappingProxyType({"dense": FULL, "moe": MOE, "uneven": UNEVEN})
MAX_CONTEXT = 128
KV_BYTES = 512 * 2**10
VOCAB_SIZE = 380
"""Ids that every kind has."""
NUM_REQUESTS = 50


class RankConformance(Suite):
    """End to end, where the backend claims the collectives that a cut model needs."""

    @pytest.mark.parametrize(
        ("kind", "count"), [("dense", 2), ("moe", 2), ("uneven", 2), ("uneven", 4)]
    )
    def test_ranks_together_give_the_text_of_one(
        self,
        kind: str,
        count: int,
        plugin: Plugin,
        capabilities: Capabilities,
        tmp_path: Path,
        record_property: Callable[[str, object], None],
    ) -> None:
        """Greedy text in float32, under traffic; heads, experts and vocabulary that do not divide, too."""
        self.require(
            capabilities.collectives.issuperset(NEEDED), "all_reduce and all_gather: not claimed"
        )
        self.require("float32" in capabilities.dtypes, "float32: not claimed")
        self.require(
            plugin.info.name in Registry.discover().names,
            "workers find plugins by their entry points, and this one has none",
        )
        if kind != "moe":
            # which has all that a dense model has
            self.thorough()
        self._plan_ranks_or_skip(plugin, count)
        files = make_checkpoint(KINDS[kind], tmp_path / kind)
        number = NUM_REQUESTS // 5 if self.is_quick else NUM_REQUESTS
        arrivals = random_traffic(number, vocab_size=VOCAB_SIZE, max_prompt=80, max_new=20, seed=7)
        theirs = self._serve_by(1, plugin, files, arrivals)
        ours = self._serve_by(count, plugin, files, arrivals)
        comparison = compare(arrivals, ours, theirs)
        record_property("figures", f"{count} ranks: {comparison}")
        comparison.check()

    def _plan_ranks_or_skip(self, plugin: Plugin, count: int) -> None:
        try:
            plugin.worker_plan(ParallelOptions(tensor=count), [plugin.probe()])
        except Incompatible as error:
            pytest.skip(str(error))

    def _serve_by(
        self, count: int, plugin: Plugin, files: ModelFiles, arrivals: Sequence[Arrival]
    ) -> Mapping[int, Answer]:
        options = EngineOptions(
            dtype="float32",
            max_context=MAX_CONTEXT,
            max_batch_rows=8,
            kv_bytes=KV_BYTES,
            parallel=ParallelOptions(tensor=count),
        )
        with running(plugin, files, options) as engine:
            return serve(engine, arrivals)
