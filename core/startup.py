"""From an EngineLaunch to a running Engine: plugin, options, weights, cache, warm-up."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..backends.backend import check_members
from ..backends.options import EngineOptions
from ..backends.plugin import Launch
from ..backends.registry import Registry, Selection
from .engine import Engine
from .errors import NotEnoughMemory
from .kv_cache.manager import KVCacheManager
from .kv_cache.sizing import KVSize, size_groups
from .loading.weights import open_weights
from .messages import EngineLaunch, Ready
from .models.build import build_decoder
from .models.config import ModelConfig
from .models.families import load_config
from .models.spec import model_spec
from .runner import Runner
from .scheduler import Scheduler

Report = Callable[[str, int, int, str], None]
"""phase, done, total, unit"""


def start_engine(
    launch: EngineLaunch, report: Report, selection: Selection | None = None
) -> Engine:
    """Load the model and size its cache. Raises a ChipsetError with the cause and the cure."""
    selection = selection or Registry.discover().select(launch.backend)
    config = load_config(launch.files.config)
    worker = _plan(selection, config, launch.options)
    runner = _load(worker, selection, config, launch, report)
    try:
        size = _size_cache(runner, launch.options)
        runner.allocate(size.num_blocks)
        runner.warm_up(max(size.num_blocks), lambda done, n: report("warm-up", done, n, "steps"))
    except BaseException:
        runner.close()
        raise
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
    return Engine(selection.plugin, runner, scheduler, ready, preempt_every=launch.preempt_every)


def _plan(selection: Selection, config: ModelConfig, options: EngineOptions) -> Launch:
    """Everything that is decided before a device is touched."""
    plugin, probe = selection.plugin, selection.probe
    capabilities = plugin.capabilities(probe)
    workers = plugin.worker_plan(options.parallel, [probe])
    asked = model_spec(config, dtype="float32", kv_dtype="float32")
    resolved = plugin.resolve(options, asked, capabilities)
    spec = model_spec(
        config,
        dtype=resolved.dtype,
        kv_dtype=resolved.dtype if resolved.kv_dtype == "auto" else resolved.kv_dtype,
        max_context=resolved.max_context,
    )
    return Launch(
        plugin=plugin.info.name,
        worker=workers[0],
        world_size=1,
        rendezvous="",
        groups={"tensor": (0,)},
        capabilities=capabilities,
        options=resolved,
        model=spec,
        shapes=plugin.shapes(resolved, spec),
    )


def _load(
    worker: Launch,
    selection: Selection,
    config: ModelConfig,
    launch: EngineLaunch,
    report: Report,
) -> Runner:
    backend = selection.plugin.create(worker)
    check_members(backend)
    try:
        with torch.inference_mode():
            built = build_decoder(
                config,
                worker.model,
                backend,
                open_weights(launch.files),
                progress=lambda done, total: report("load", done, total, "B"),
            )
    except MemoryError:
        backend.close()
        raise NotEnoughMemory(
            f"the weights need {_size(worker.model.weight_bytes)} and do not fit; take a smaller "
            "model, or --dtype bfloat16"
        ) from None
    except BaseException:
        backend.close()
        raise
    return Runner(backend, worker, built.model)


def _size_cache(runner: Runner, asked: EngineOptions) -> KVSize:
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
            f"{_size(max(budget, 0))} are left for the KV cache, which is not enough for a single "
            "request; free memory, or take a smaller model"
        )
    if asked.max_context is not None and size.num_tokens < asked.max_context:
        raise NotEnoughMemory(
            f"{_size(budget)} of KV cache hold {size.num_tokens} tokens, fewer than the "
            f"{asked.max_context} asked for; --max-total-tokens {size.num_tokens} fits"
        )
    return size


def _ready(selection: Selection, runner: Runner, size: KVSize) -> Ready:
    launch = runner.launch
    options, spec = launch.options, launch.model
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
        weight_bytes=spec.weight_bytes,
        reasons=reasons,
    )


def _size(num_bytes: int) -> str:
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"
