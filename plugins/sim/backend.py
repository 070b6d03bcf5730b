"""The worker half of the simulators: the torch references under rules."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from ...backends.attention import Attention
from ...backends.backend import Backend
from ...backends.plugin import Launch
from ...backends.reference.attention import ReferenceAttention
from ...backends.reference.collectives import RankCollectives, SingleRank, join
from ...backends.reference.operators import OperatorCollectives
from ...backends.reference.ops import ReferenceOps
from ...backends.reference.packed import KINDS
from ...backends.reference.quantization import ReferenceLinear
from ...backends.reference.sampler import ReferenceSampler
from ...backends.reference.staging import Staged, stage
from ...backends.step import StepBatch
from ...backends.telemetry import Telemetry
from .compiler import CaptureCompiler, SimCompiler
from .donation import Donation
from .kv_cache import SimKVCache
from .packed import PackedAttention, packed_arrays
from .rules import StepRules
from .runtime import SimRuntime
from .tiles import tiled_arrays

PLAIN = frozenset({"plain"})


class SimBackend(Backend):
    """One emulated device.

    in_place: caches are written to, else given away; infinities: the device knows them; packed: it multiplies by packed
    weights.
    """

    compiler: SimCompiler

    def __init__(
        self,
        launch: Launch,
        *,
        in_place: bool = True,
        infinities: bool = True,
        packed: bool = False,
    ) -> None:
        shapes, graphs = launch.shapes, launch.capabilities.graphs
        self.block_size = launch.options.block_size
        self.is_rows_layout = shapes.batch.token_layout == "rows"
        self.rules = StepRules(launch)
        self.runtime = SimRuntime(
            {
                "int64": graphs != "capture",
                "negative_index": True,
                "host_index": True,
                "infinity": not infinities,
            },
            launch.worker.devices[0],
        )
        donation = Donation()
        self.compiler = (
            CaptureCompiler(donation, shapes.buckets(0))
            if graphs == "capture"
            else SimCompiler(donation, donates=not in_place)
        )
        self.kv = SimKVCache(
            self.runtime,
            launch,
            donation,
            is_fixed=lambda: bool(self.compiler.graphs),
            in_place=in_place,
        )
        fp8_max = launch.capabilities.fp8_max
        self.attention: Attention = (
            PackedAttention(fp8_max=fp8_max)
            if self.is_rows_layout
            else ReferenceAttention(in_place=in_place, fp8_max=fp8_max)
        )
        self.linear = ReferenceLinear(self.runtime, PLAIN | KINDS if packed else PLAIN)
        self.ops = ReferenceOps()
        self.comm: RankCollectives = _meet(launch)
        self.sampler = ReferenceSampler(launch.options.max_logprobs, in_place=in_place)
        self.telemetry = SimTelemetry(self.compiler)

    def prepare(self, batch: StepBatch) -> Staged:
        """See Backend.prepare. Raises RuleBroken where the batch breaks a rule of composition."""
        self.rules.check(batch)
        arrays = packed_arrays if self.is_rows_layout else tiled_arrays
        return stage(batch, arrays(batch, self.block_size), self.runtime.put)

    def close(self) -> None:
        """See Backend.close."""
        self.comm.close()


def _meet(launch: Launch) -> RankCollectives:
    if launch.world_size == 1:
        return SingleRank()
    # what recording imports, for seconds that the others would take for silence
    import_module("torch._dynamo")
    return OperatorCollectives(join(launch))


class SimTelemetry(Telemetry):
    """Of the compiler."""

    def __init__(self, compiler: SimCompiler) -> None:
        self.compiler = compiler

    def counters(self) -> Mapping[str, float]:
        """compiles, compiles_after_freeze."""
        return {
            "compiles": len(self.compiler.graphs),
            "compiles_after_freeze": self.compiler.num_late,
        }
