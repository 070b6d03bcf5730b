"""Parent halves that say too little, or keep quiet about what they change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from chipset.backends.capabilities import Capabilities
from chipset.backends.errors import Incompatible
from chipset.backends.options import (
    EngineOptions,
    ModelSpec,
    ParallelOptions,
    ResolvedOptions,
    SamplingParams,
)
from chipset.backends.plugin import Plugin, Probe, WorkerSpec

from ..mutation import Mutation
from ..reference_plugin import CAPABILITIES, ReferencePlugin


class OlderContract(ReferencePlugin):
    info = replace(ReferencePlugin.info, api_version=(0, 1))


class NoSummary(ReferencePlugin):
    info = replace(ReferencePlugin.info, summary="")


class SilentProbe(ReferencePlugin):
    def probe(self) -> Probe:
        return replace(super().probe(), reason="")


class UnknownFeature(ReferencePlugin):
    def capabilities(self, probe: Probe) -> Capabilities:
        return replace(CAPABILITIES, features=CAPABILITIES.features | {"mirostat"})


class NoAuto(ReferencePlugin):
    def capabilities(self, probe: Probe) -> Capabilities:
        return replace(CAPABILITIES, kv_dtypes=frozenset({"float32"}))


class OptionsFilledIn(ReferencePlugin):
    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        found = super().resolve(options, model, capabilities)
        options.backend_options["mode"] = "fast"  # type: ignore[index]
        return found


class EachTimeFewer(ReferencePlugin):
    num_rows = 9

    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        self.num_rows -= 1
        found = super().resolve(options, model, capabilities)
        return replace(found, max_batch_rows=min(found.max_batch_rows, self.num_rows))


class ReasonMissing(ReferencePlugin):
    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        found = super().resolve(options, model, capabilities)
        return replace(found, reasons={n: r for n, r in found.reasons.items() if n != "block_size"})


class BlockSizeRounded(ReferencePlugin):
    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        if options.block_size not in (None, *capabilities.block_sizes):
            options = replace(options, block_size=max(capabilities.block_sizes))
        return super().resolve(options, model, capabilities)


class DtypeOverruled(ReferencePlugin):
    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        return super().resolve(replace(options, dtype="float32"), model, capabilities)


class ChoicesUnnamed(ReferencePlugin):
    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        try:
            return super().resolve(options, model, capabilities)
        except Incompatible as error:
            raise Incompatible("an option cannot be honoured") from error


class ContextCut(ReferencePlugin):
    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        if options.max_context is not None:
            most = min(options.max_context, model.max_context)
            options = replace(options, max_context=most)
        return super().resolve(options, model, capabilities)


class OptionsIgnored(ReferencePlugin):
    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        return super().resolve(replace(options, backend_options={}), model, capabilities)


class TakesAll(ReferencePlugin):
    def check_request(
        self,
        sampling: SamplingParams,
        features: frozenset[str],
        options: ResolvedOptions,
        capabilities: Capabilities,
    ) -> str | None:
        return None


class LimitsForgotten(ReferencePlugin):
    def check_request(
        self,
        sampling: SamplingParams,
        features: frozenset[str],
        options: ResolvedOptions,
        capabilities: Capabilities,
    ) -> str | None:
        room = replace(options, max_logprobs=2**20, max_logit_bias=2**20)
        return super().check_request(sampling, features, room, capabilities)


class FewerWorkers(ReferencePlugin):
    def worker_plan(
        self, parallel: ParallelOptions, hosts: Sequence[Probe]
    ) -> Sequence[WorkerSpec]:
        return super().worker_plan(ParallelOptions(), hosts)


class RanksFromOne(ReferencePlugin):
    def worker_plan(
        self, parallel: ParallelOptions, hosts: Sequence[Probe]
    ) -> Sequence[WorkerSpec]:
        plan = super().worker_plan(parallel, hosts)
        return [replace(worker, rank=worker.rank + 1) for worker in plan]


def _mutation(name: str, mistake: str, plugin: type[Plugin]) -> Mutation:
    return Mutation(name=name, area="plugin", mistake=mistake, plugin=plugin)


MUTATIONS: tuple[Mutation, ...] = (
    _mutation("older contract", "it was built for another minor of the contract", OlderContract),
    _mutation("no summary", "it does not say what it is", NoSummary),
    _mutation("silent probe", "a probe gives no reason", SilentProbe),
    _mutation(
        "unknown feature", "it claims a feature that the contract does not name", UnknownFeature
    ),
    _mutation("no auto", "the cache may not have the model's dtype", NoAuto),
    _mutation("options filled in", "resolve writes into the user's options", OptionsFilledIn),
    _mutation("each time fewer", "resolve depends on how often it was called", EachTimeFewer),
    _mutation("reason missing", "a resolved option has no reason", ReasonMissing),
    _mutation("block size rounded", "a block size not served becomes another", BlockSizeRounded),
    _mutation("dtype overruled", "the user's dtype is changed silently", DtypeOverruled),
    _mutation("choices unnamed", "a refusal does not say what would do", ChoicesUnnamed),
    _mutation("context cut", "a context longer than the model's is cut silently", ContextCut),
    _mutation("options ignored", "an option that it does not know is ignored", OptionsIgnored),
    _mutation("takes all", "requests are taken whatever they need", TakesAll),
    _mutation("limits forgotten", "more logprobs and biases are taken than fit", LimitsForgotten),
    _mutation("fewer workers", "two shards become one worker", FewerWorkers),
    _mutation("ranks from one", "no worker has rank 0", RanksFromOne),
)
