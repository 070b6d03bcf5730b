"""From an EngineLaunch to a running Engine: plugin, options, weights, cache, warm-up."""

from __future__ import annotations

import os

from ..backends.options import EngineOptions
from ..backends.registry import Registry, Selection
from .engine import Engine
from .errors import NotEnoughMemory
from .executors.executor import Executor, Report
from .executors.start import start_executor
from .kv_cache.manager import KVCacheManager
from .kv_cache.sizing import KVSize, size_groups
from .messages import EngineLaunch, Ready
from .models.families import load_config
from .nodes import Nodes
from .plan import all_devices, check_places, plan_launches
from .scheduler import Scheduler
from .worker import are_packed, human_size


def start_engine(
    launch: EngineLaunch, report: Report, selection: Selection | None = None
) -> Engine:
    """Load the model and size its cache. Raises a ChipsetError with the cause and the cure."""
    registry = Registry.discover()
    selection = selection or registry.select(launch.backend)
    plugin, probe = selection.plugin, selection.probe
    config = load_config(launch.files.config)
    nodes = Nodes.read(os.environ)
    if nodes is not None:
        asked, hosts = nodes.options(launch.options), nodes.hosts(probe)
    else:
        asked = all_devices(launch.options, plugin, probe) if launch.sharded else launch.options
        hosts = [probe]
    name = plugin.info.name
    formats = registry.formats(name) if name in registry.names else ()
    packed = are_packed(launch.files, launch.quantize, formats)
    launches = plan_launches(plugin, hosts, config, asked, packed=packed)
    if nodes is not None:
        check_places(launches, nodes)
    runner = start_executor(
        launches, plugin, config, launch.files, launch.quantize, formats, report, nodes
    )
    try:
        size = _size_cache(runner, launch.options)
        runner.allocate(size.num_blocks)
        runner.warm_up(max(size.num_blocks), lambda done, n: report("warm-up", done, n, "steps"))
    except BaseException:
        runner.close()
        raise
    worker = runner.launch
    options = worker.options
    kv = KVCacheManager(
        worker.model.groups,
        size.num_blocks,
        block_size=options.block_size,
        max_step_tokens=worker.shapes.batch.max_tokens,
        prefix_cache=launch.prefix_cache and worker.capabilities.prefix_cache,
    )
    ready = _ready(selection, runner, size)
    scheduler = Scheduler(
        worker.shapes,
        worker.capabilities,
        kv,
        num_slots=options.max_batch_rows,
        max_context=ready.max_context,
    )
    return Engine(plugin, runner, scheduler, ready, preempt_every=launch.preempt_every)


def _size_cache(runner: Executor, asked: EngineOptions) -> KVSize:
    """Blocks for what the device has left, or for --kv-cache-memory."""
    launch = runner.launch
    options, policy = launch.options, launch.shapes.batch
    budget = options.kv_bytes if options.kv_bytes is not None else runner.budget()
    size = size_groups(
        launch.model.groups,
        runner.block_bytes(),
        budget,
        block_size=options.block_size,
        max_rows=options.max_batch_rows,
        max_step_tokens=policy.max_tokens,
        max_context=options.max_context,
    )
    if size.num_tokens < 2 * options.block_size:
        raise NotEnoughMemory(
            f"{human_size(max(budget, 0))} are left for the KV cache, which is not enough for a single "
            "request; free memory, or take a smaller model"
        )
    if asked.max_context is not None and size.num_tokens < asked.max_context:
        raise NotEnoughMemory(
            f"{human_size(budget)} of KV cache hold {size.num_tokens} tokens, fewer than the "
            f"{asked.max_context} asked for; --max-total-tokens {size.num_tokens} fits"
        )
    return size


def _ready(selection: Selection, runner: Executor, size: KVSize) -> Ready:
    launch = runner.launch
    options, spec, held = launch.options, launch.model, runner.weights[0]
    max_context = min(options.max_context, size.num_tokens)
    reasons = dict(options.reasons)
    if max_context < options.max_context:
        reasons["max_context"] = f"the KV cache holds {size.num_tokens} tokens"
    return Ready(
        backend=launch.plugin,
        device=selection.probe.architecture or launch.capabilities.device_type,
        reason=selection.reason,
        architecture=spec.architecture,
        dtype=options.dtype,
        kv_dtype=spec.groups[0].dtype,
        block_size=options.block_size,
        num_blocks=max(size.num_blocks) - 1,
        kv_tokens=size.num_tokens,
        kv_bytes=size.num_bytes,
        max_context=max_context,
        max_batch_tokens=launch.shapes.batch.max_tokens,
        max_batch_rows=options.max_batch_rows,
        max_logprobs=options.max_logprobs,
        max_logit_bias=options.max_logit_bias,
        features=sorted(launch.capabilities.features),
        weight_bytes=held.held_bytes,
        rank_weight_bytes=[one.held_bytes for one in runner.weights],
        kernels=dict(held.kernels),
        dequantised=dict(held.dequantised),
        dequantised_bytes=held.dequantised_bytes,
        reasons=reasons,
    )
