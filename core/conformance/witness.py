"""A witness beside a plugin: what its steps cost, what it compiles and when, seen from outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from ...backends.backend import Backend
from ...backends.capabilities import Capabilities
from ...backends.compiler import Compiler, CompileReport
from ...backends.conformance.watch import Counts, Watch
from ...backends.options import (
    EngineOptions,
    ModelSpec,
    ParallelOptions,
    ResolvedOptions,
    SamplingParams,
)
from ...backends.plugin import Launch, Plugin, Probe, WorkerSpec
from ...backends.shapes import Bucket, ShapePolicy
from ...backends.step import StepBatch, StepOutput
from ..engine import Engine
from ..executors.executor import Reset
from ..runner import Runner

Runs = Sequence[tuple[Bucket, frozenset[str]]]
Fault = Callable[[StepBatch], Exception | None]
"""What the device raises in a step, before or after running it."""


def no_fault(batch: StepBatch) -> Exception | None:  # noqa: ARG001
    """All is well."""
    return None


class Witness:
    """What was seen of one engine."""

    def __init__(self, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self.watch: Watch | None = None
        self.is_frozen = False
        self.num_steps: Counter[str] = Counter()
        """"drawing" and "silent" steps."""
        self.num_waits: Counter[str] = Counter()
        """For the device, by the kind of step."""
        self.num_preemptions = 0
        self.violations: Counter[str] = Counter()
        """Steps that cost more than they may, by what."""
        self.late_compiles: list[str] = []
        """What was traced after freeze() in a form never seen before it."""
        self.fault_before: Fault = no_fault
        self.fault_after: Fault = no_fault
        self.batch: StepBatch | None = None
        self._seen: set[object] = set()
        self._declared: frozenset[Bucket] = frozenset()

    def traced(self, name: str, arguments: tuple[Any, ...]) -> None:
        """The Python code of a module ran: to compile it, or because nothing is compiled."""
        if self.capabilities.graphs == "none":
            return
        leaves, structure = pytree.tree_flatten(arguments)
        form = (name, str(structure), tuple((tuple(x.shape), str(x.dtype)) for x in leaves))
        bucket = arguments[0].bucket
        # a device that captures some sizes runs the others op by op
        is_eager = self.capabilities.graphs == "capture" and bucket not in self._declared
        if self.is_frozen and form not in self._seen and not is_eager:
            self.late_compiles.append(f"{name} {bucket}")
        self._seen.add(form)

    def follow(self, engine: Engine) -> None:
        """Look at every step of `engine` from now on."""
        runner, watch = engine.runner, self.watch
        assert isinstance(runner, Runner), "other processes cannot be watched"
        assert watch is not None
        run = runner.step

        def step(batch: StepBatch, resets: Sequence[Reset] = ()) -> StepOutput | None:
            for reset in resets:
                runner.reset(reset)
            before = watch.counts()
            output = run(batch)
            self.check(batch, output, watch.counts() - before)
            return output

        runner.step = step  # type: ignore[method-assign]

    def follow_compiler(self, compiler: Compiler) -> None:
        """See what `compiler` wraps, and when it is frozen."""
        wrap, warm_up, freeze = compiler.wrap, compiler.warm_up, compiler.freeze

        def seen_wrap(name: str, module: nn.Module) -> Callable[..., Any]:
            module.register_forward_pre_hook(lambda _, arguments: self.traced(name, arguments))
            run = wrap(name, module)
            return run if name == "draw" else self._faulty(run)

        def seen_warm_up(runs: Runs, run: Any, progress: Any) -> CompileReport:
            self._declared = frozenset(bucket for bucket, _ in runs)
            return warm_up(runs, run, progress)

        @contextmanager
        def seen_freeze() -> Iterator[None]:
            with freeze():
                self.is_frozen = True
                yield
                self.is_frozen = False

        compiler.wrap = seen_wrap  # type: ignore[method-assign]
        compiler.warm_up = seen_warm_up  # type: ignore[method-assign]
        compiler.freeze = seen_freeze  # type: ignore[method-assign]

    def _faulty(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*arguments: Any) -> Any:
            assert self.batch is not None
            if (error := self.fault_before(self.batch)) is not None:
                raise error
            result = run(*arguments)
            if (error := self.fault_after(self.batch)) is not None:
                raise error
            return result

        return faulty

    def check(self, batch: StepBatch, output: StepOutput | None, seen: Counts) -> None:
        """Note what a step cost beyond what it may: a wait where it draws, a copy for each dtype either way."""
        kind = "drawing" if batch.num_logits else "silent"
        self.num_steps[kind] += 1
        self.num_waits[kind] += seen.waits
        arrays = [getattr(output, name, None) for name in StepOutput.__dataclass_fields__]
        num_dtypes = len({array.dtype for array in arrays if array is not None})
        limits = {
            "waits": (seen.waits, 1 if batch.num_logits else 0),
            "synchronizes": (seen.synchronizes, 0),
            "reads before result()": (seen.reads_outside, 0),
            "copies to the host": (seen.reads, num_dtypes),
            "copies to the device": (seen.uploads, 2),
            "refusals of the device": (seen.refused, 0),
        }
        for what, (count, most) in limits.items():
            if count > most or (what == "waits" and count != most):
                self.violations[f"{what}: {count}, allowed {most}"] += 1

    def assert_clean(self) -> None:
        """Steps were seen, none cost too much, and nothing was compiled late."""
        assert self.num_steps["drawing"] > 0, "no step was seen"
        assert not self.violations, dict(self.violations)
        assert not self.late_compiles, self.late_compiles[:5]

    def __str__(self) -> str:
        steps = ", ".join(
            f"{count} {kind} steps with {self.num_waits[kind]} waits"
            for kind, count in sorted(self.num_steps.items())
        )
        return (
            f"{steps}; {self.num_preemptions} preemptions; {len(self.late_compiles)} late compiles"
        )


class WitnessedPlugin(Plugin):
    """Another plugin, whose backend is seen by a Witness."""

    def __init__(self, plugin: Plugin) -> None:
        self.plugin = plugin
        self.info = plugin.info
        self.witness = Witness(plugin.capabilities(plugin.probe()))

    def probe(self) -> Probe:
        """The plugin's."""
        return self.plugin.probe()

    def capabilities(self, probe: Probe) -> Capabilities:
        """The plugin's."""
        return self.plugin.capabilities(probe)

    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        """The plugin's."""
        return self.plugin.resolve(options, model, capabilities)

    def shapes(self, options: ResolvedOptions, model: ModelSpec) -> ShapePolicy:
        """The plugin's."""
        return self.plugin.shapes(options, model)

    def check_request(
        self,
        sampling: SamplingParams,
        features: frozenset[str],
        options: ResolvedOptions,
        capabilities: Capabilities,
    ) -> str | None:
        """The plugin's."""
        return self.plugin.check_request(sampling, features, options, capabilities)

    def worker_plan(
        self, parallel: ParallelOptions, hosts: Sequence[Probe]
    ) -> Sequence[WorkerSpec]:
        """The plugin's."""
        return self.plugin.worker_plan(parallel, hosts)

    def create(self, launch: Launch) -> Backend:
        """The plugin's backend, watched."""
        backend = self.plugin.create(launch)
        witness = self.witness
        witness.watch = Watch(backend)
        prepare = backend.prepare

        def remember(batch: StepBatch) -> Any:
            witness.batch = batch
            return prepare(batch)

        backend.prepare = remember  # type: ignore[method-assign]
        witness.follow_compiler(backend.compiler)
        return backend
