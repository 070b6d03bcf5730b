"""The parent half: what a plugin says of itself, how it fills options in, and which requests it takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import FrozenInstanceError, fields, replace
from typing import get_args, get_type_hints

import pytest

from ..capabilities import Capabilities
from ..entries import find_entries
from ..errors import Incompatible
from ..options import EngineOptions, ParallelOptions, ResolvedOptions, SamplingParams
from ..plugin import API_VERSION, Plugin, PluginInfo, Probe, WorkerSpec
from ..reference.dtypes import torch_dtype
from .suite import Suite, small_model

FEATURES = frozenset(
    ("sampled", "filters", "penalties", "bias", "bitmask", "targets", "logprobs", "watermark")
)
ATTENTION = frozenset(
    ("window", "soft_cap", "sinks", "alibi", "chunk", "spans", "tree", "latent", "cross")
)
COLLECTIVES = frozenset(
    ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_receive")
)
SDKS = (
    *("torch", "triton", "cupy", "cuda", "hip", "habana_frameworks", "torch_neuronx", "neuronxcc"),
    *("libneuronxla", "nki", "torch_xla", "jax", "libtpu", "torch_npu", "tensorrt", "openvino"),
    *("intel_extension_for_pytorch", "onnxruntime", "vllm"),
)
"""What a parent half must not import: torch, and whatever opens a device. Bindings of NVML and its like do not."""
TOO_MANY = 2**20
"""Shards."""
REQUESTS: Mapping[str, tuple[SamplingParams, frozenset[str]]] = {
    "sampled": (SamplingParams(temperature=0.7), frozenset()),
    "filters": (SamplingParams(temperature=0.7, top_k=5, top_p=0.9), frozenset()),
    "penalties": (SamplingParams(repetition_penalty=1.2), frozenset()),
    "bias": (SamplingParams(logit_bias={3: 1.5}), frozenset()),
    "logprobs": (SamplingParams(num_logprobs=1), frozenset()),
    "watermark": (SamplingParams(watermark=True), frozenset()),
    "bitmask": (SamplingParams(), frozenset({"bitmask"})),
    "targets": (SamplingParams(), frozenset({"targets"})),
}
"""By feature, a request that needs it: its parameters, and what it needs beside them."""
CHILD = """
import sys
from chipset.backends.options import *
from chipset.backends.options import AttentionSpec, KVGroup
from chipset.backends.registry import Registry

model = {model!r}
plugin = Registry.discover().load({name!r})
capabilities = plugin.capabilities(plugin.probe())
options = plugin.resolve(EngineOptions(), model, capabilities)
policy = plugin.shapes(options, model)
policy.buckets(64), policy.draw_variants(), policy.largest(), plugin.info
plugin.check_request(SamplingParams(), frozenset(), options, capabilities)
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


class PluginSuite(Suite):
    """The parent half."""

    @pytest.fixture
    def resolved(self, plugin: Plugin, capabilities: Capabilities) -> ResolvedOptions:
        """What the plugin makes of options that leave everything open."""
        return plugin.resolve(EngineOptions(), small_model(), capabilities)

    def test_it_says_who_it_is(self, plugin: Plugin) -> None:
        info = plugin.info
        assert isinstance(info, PluginInfo)
        assert info.api_version == API_VERSION
        for text in (info.name, info.distribution, info.summary):
            assert text.strip(), f"{info} leaves a field empty"
            assert "\n" not in text
        for names in (info.environment, info.options):
            assert all(isinstance(name, str) and name for name in names)

    def test_it_is_named_as_its_entry_point_and_distribution(self, plugin: Plugin) -> None:
        self.require(self.backend, "made by the suite, not found by an entry point")
        entries = {entry.name: entry for entry in find_entries()}
        distribution = entries[self.backend].dist
        assert plugin.info.name == self.backend
        assert distribution is not None
        assert plugin.info.distribution == distribution.name

    def test_its_parent_half_imports_no_sdk(self) -> None:
        self.require(self.backend, "made by the suite, not found by an entry point")
        script = CHILD.format(model=small_model(), name=self.backend)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        imported = sorted(set(done.stdout.split()) & set(SDKS))
        assert not imported, f"calling its parent half imports {', '.join(imported)}"

    def test_its_probe_has_a_reason(self, plugin: Plugin) -> None:
        probe = plugin.probe()
        assert isinstance(probe, Probe)
        assert probe.reason.strip()
        assert probe.num_devices >= int(probe.available)

    def test_its_capabilities_are_frozen_and_well_formed(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        assert isinstance(capabilities, Capabilities)
        assert plugin.capabilities(plugin.probe()) == capabilities
        with pytest.raises(FrozenInstanceError):
            capabilities.device_type = "other"  # type: ignore[misc]
        assert capabilities.device_type
        assert ":" not in capabilities.device_type
        hints = get_type_hints(Capabilities)
        assert capabilities.graphs in get_args(hints["graphs"])
        assert capabilities.kv_budget in get_args(hints["kv_budget"])
        assert capabilities.fp8_max in (None, 240, 448)
        assert capabilities.dtypes
        for dtype in capabilities.dtypes | capabilities.kv_dtypes - {"auto"}:
            torch_dtype(dtype)
        assert "auto" in capabilities.kv_dtypes
        sizes = capabilities.block_sizes
        assert sizes
        assert len(set(sizes)) == len(sizes)
        assert all(isinstance(size, int) and size > 0 for size in sizes)

    @pytest.mark.parametrize(
        ("field", "known"),
        [("features", FEATURES), ("attention", ATTENTION), ("collectives", COLLECTIVES)],
    )
    def test_its_capabilities_are_among_those_that_the_contract_names(
        self, capabilities: Capabilities, field: str, known: frozenset[str]
    ) -> None:
        unknown = getattr(capabilities, field) - known
        assert not unknown, f"the contract knows no {field} {', '.join(sorted(unknown))}"

    def test_resolve_fills_every_field_and_says_why(
        self, capabilities: Capabilities, resolved: ResolvedOptions
    ) -> None:
        names = {field.name for field in fields(ResolvedOptions)} - {"reasons"}
        silent = sorted(name for name in names if not resolved.reasons.get(name, "").strip())
        assert not silent, f"no reason for {', '.join(silent)}"
        assert resolved.dtype in capabilities.dtypes
        assert resolved.kv_dtype != "auto"
        torch_dtype(resolved.kv_dtype)
        assert resolved.block_size in capabilities.block_sizes
        assert 0 < resolved.max_context <= small_model().max_context
        assert resolved.max_batch_rows >= 1
        assert resolved.max_batch_tokens >= 1
        if not capabilities.chunked_prefill:
            assert resolved.max_batch_tokens >= resolved.max_context
        assert resolved.max_logprobs >= int("logprobs" in capabilities.features)
        assert resolved.max_logit_bias >= int("bias" in capabilities.features)

    def test_resolve_is_a_function_of_its_arguments_and_changes_none(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        options = EngineOptions(max_context=256, backend_options={})
        before, model = deepcopy(options), small_model()
        first, second = (plugin.resolve(options, model, capabilities) for _ in range(2))
        assert first == second
        assert options == before
        assert model == small_model()

    def test_resolve_keeps_what_the_user_set(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        for dtype in sorted(capabilities.dtypes):
            assert self._resolve(plugin, capabilities, dtype=dtype).dtype == dtype
        for size in capabilities.block_sizes:
            assert self._resolve(plugin, capabilities, block_size=size).block_size == size
        asked = {"max_context": 256, "max_batch_rows": 4, "memory_utilisation": 0.5}
        found = self._resolve(plugin, capabilities, **asked)
        assert {name: getattr(found, name) for name in asked} == asked
        assert self._resolve(plugin, capabilities, kv_bytes=2**24).kv_bytes == 2**24

    def test_resolve_refuses_a_dtype_or_block_size_that_is_not_served_and_names_those_that_are(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        with pytest.raises(Incompatible) as caught:
            self._resolve(plugin, capabilities, dtype="float3")
        _names(caught.value, "float3", *capabilities.dtypes)
        with pytest.raises(Incompatible) as caught:
            self._resolve(plugin, capabilities, kv_dtype="float3")
        _names(caught.value, "float3", *capabilities.kv_dtypes)
        wrong = 1 + max(capabilities.block_sizes)
        with pytest.raises(Incompatible) as caught:
            self._resolve(plugin, capabilities, block_size=wrong)
        _names(caught.value, str(wrong), *map(str, capabilities.block_sizes))

    def test_resolve_refuses_options_that_it_does_not_know(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        with pytest.raises(Incompatible) as caught:
            self._resolve(plugin, capabilities, backend_options={"no_such_option": "1"})
        _names(caught.value, "no_such_option", *plugin.info.options)

    def test_resolve_refuses_a_context_longer_than_the_models(
        self, plugin: Plugin, capabilities: Capabilities
    ) -> None:
        with pytest.raises(Incompatible):
            self._resolve(plugin, capabilities, max_context=2 * small_model().max_context)

    def test_shapes_follow_the_options(self, plugin: Plugin, resolved: ResolvedOptions) -> None:
        first, second = (plugin.shapes(resolved, small_model()) for _ in range(2))
        assert first.batch == second.batch
        assert list(first.buckets(64)) == list(second.buckets(64))
        assert list(first.draw_variants()) == list(second.draw_variants())

    def test_one_shard_is_one_worker(self, plugin: Plugin) -> None:
        probe = plugin.probe()
        plan = plugin.worker_plan(ParallelOptions(), [probe])
        assert [worker.rank for worker in plan] == [0]
        worker = plan[0]
        assert isinstance(worker, WorkerSpec)
        assert (worker.local_rank, worker.host) == (0, 0)
        assert worker.devices
        assert set(worker.devices) <= set(range(probe.num_devices))
        for name, value in worker.environment.items():
            assert isinstance(name, str)
            assert isinstance(value, str)

    def test_more_shards_than_any_host_holds_are_refused(self, plugin: Plugin) -> None:
        with pytest.raises(Incompatible):
            plugin.worker_plan(ParallelOptions(tensor=TOO_MANY), [plugin.probe()])

    @pytest.mark.parametrize("feature", sorted(REQUESTS))
    def test_a_request_is_taken_where_its_feature_is_claimed_and_refused_where_it_is_not(
        self,
        plugin: Plugin,
        capabilities: Capabilities,
        resolved: ResolvedOptions,
        feature: str,
    ) -> None:
        sampling, beside = REQUESTS[feature]
        needed = sampling.features | beside
        none_of_it = replace(capabilities, features=capabilities.features - {feature})
        if needed <= capabilities.features:
            assert plugin.check_request(sampling, beside, resolved, capabilities) is None
        else:
            _refused(plugin.check_request(sampling, beside, resolved, capabilities))
        _refused(plugin.check_request(sampling, beside, resolved, none_of_it))

    def test_a_request_that_needs_nothing_is_taken(
        self, plugin: Plugin, capabilities: Capabilities, resolved: ResolvedOptions
    ) -> None:
        plain = SamplingParams()
        assert plugin.check_request(plain, frozenset(), resolved, capabilities) is None

    def test_a_request_for_more_than_there_is_room_for_is_refused(
        self, plugin: Plugin, capabilities: Capabilities, resolved: ResolvedOptions
    ) -> None:
        limits: dict[str, tuple[int, Callable[[int], SamplingParams]]] = {
            "logprobs": (resolved.max_logprobs, lambda n: SamplingParams(num_logprobs=n)),
            "bias": (
                resolved.max_logit_bias,
                lambda n: SamplingParams(logit_bias=dict.fromkeys(range(n), 1.0)),
            ),
        }
        for feature, (limit, most) in limits.items():
            if feature in capabilities.features:
                assert (
                    plugin.check_request(most(limit), frozenset(), resolved, capabilities) is None
                )
            _refused(plugin.check_request(most(limit + 1), frozenset(), resolved, capabilities))

    def _resolve(
        self, plugin: Plugin, capabilities: Capabilities, **options: object
    ) -> ResolvedOptions:
        return plugin.resolve(EngineOptions(**options), small_model(), capabilities)  # type: ignore[arg-type]


def _names(error: Incompatible, *words: str) -> None:
    missing = [word for word in words if word not in str(error)]
    assert not missing, f"{str(error)!r} does not name {', '.join(missing)}"


def _refused(reason: str | None) -> None:
    assert reason is not None, "taken, though it would not be honoured"
    assert reason.strip(), "refused without a reason"
