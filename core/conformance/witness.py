"""A witness beside a plugin: what its steps cost, what it compiles and when, seen from outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from ..runner import Reset

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
        self.late_compiles: list[str] = []
        """What was traced after freeze() in a form never seen before it."""
        self.fault_before: Fault = no_fault
        self.fault_after: Fault = no_fault
        self.batch: StepBatch | None = None
        self._seen: set[object] = set()
        self._declared: frozenset[Bucket] = frozenset()

    def declare(self, buckets: Sequence[Bucket]) -> None:
        """The buckets that warm-up covers."""
        self._declared = frozenset(buckets)

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
        """Check every step of `engine` from now on."""
        run, watch = engine.runner.step, self.watch
        assert watch is not None

        def step(batch: StepBatch, resets: Sequence[Reset] = ()) -> StepOutput | None:
            for reset in resets:
                engine.runner.reset(reset)
            before = watch.counts()
            output = run(batch)
            self.check(batch, watch.counts() - before)
            return output

        engine.runner.step = step  # type: ignore[method-assign]

    def check(self, batch: StepBatch, seen: Counts) -> None:
        """Assert what a step may cost: one wait where it draws or scores, none elsewhere, one copy up a dtype."""
        self.num_steps["drawing" if batch.num_logits else "silent"] += 1
        wanted = 1 if batch.num_logits else 0
        assert seen.waits == wanted, f"{seen.waits} waits in a step of {batch.num_logits} draws"
        assert seen.synchronizes == 0, "the device was synchronized within a step"
        assert seen.reads_outside == 0, "the device was read before result()"
        assert seen.reads <= 2 * wanted, f"{seen.reads} copies to the host; one a dtype is enough"
        assert seen.uploads <= 2, f"{seen.uploads} copies to the device; one a dtype is enough"
        assert seen.refused == 0, "the device refused something"


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
        backend.compiler = _SeenCompiler(backend.compiler, witness, launch.shapes)
        return backend


class _SeenCompiler(Compiler):
    def __init__(self, compiler: Compiler, witness: Witness, shapes: ShapePolicy) -> None:
        self._compiler, self._witness, self._shapes = compiler, witness, shapes

    def wrap(self, name: str, module: nn.Module) -> Callable[..., Any]:
        witness = self._witness
        module.register_forward_pre_hook(lambda _, arguments: witness.traced(name, arguments))
        run = self._compiler.wrap(name, module)
        if name == "draw":
            return run

        def faulty(*arguments: Any) -> Any:
            batch = witness.batch
            assert batch is not None
            if (error := witness.fault_before(batch)) is not None:
                raise error
            result = run(*arguments)
            if (error := witness.fault_after(batch)) is not None:
                raise error
            return result

        return faulty

    def warm_up(
        self,
        runs: Sequence[tuple[Bucket, frozenset[str]]],
        run: Callable[[Bucket, frozenset[str]], None],
        progress: Callable[[int], None],
    ) -> CompileReport:
        self._witness.declare([bucket for bucket, _ in runs])
        return self._compiler.warm_up(runs, run, progress)

    @contextmanager
    def _frozen(self) -> Any:
        with self._compiler.freeze():
            self._witness.is_frozen = True
            yield
            self._witness.is_frozen = False

    def freeze(self) -> AbstractContextManager[None]:
        frozen: AbstractContextManager[None] = self._frozen()
        return frozen
