"""How most plugins resolve options: take what was asked for, else a default, each with its reason. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..capabilities import Capabilities
from ..errors import Incompatible
from ..options import EngineOptions, ModelSpec, ParallelOptions, ResolvedOptions

T = TypeVar("T")
ASKED_FOR = "asked for"


@dataclass(frozen=True, kw_only=True, slots=True)
class Default(Generic[T]):
    """What is taken where the user left it open, and why."""

    value: T
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """Of one backend on one machine; block_size is the first of the capabilities."""

    backend: str
    dtype: Default[str] = Default(value="float32", reason="what the references compute in")
    block_size: str = "the first of those served"
    """Why the first of Capabilities.block_sizes."""
    max_batch_tokens: Default[int] = Default(value=256, reason="a few steps for a long prompt")
    max_batch_rows: Default[int] = Default(value=16, reason="enough to share a step")
    max_logprobs: Default[int] = Default(value=20, reason="what OpenAI's API allows")
    max_logit_bias: Default[int] = Default(value=64, reason="room for a few tokens a request")
    memory_utilisation: str = "share of the device's memory"
    """What it is a share of."""
    graph_memory: Default[float] = Default(value=0.0, reason="graphs here hold no memory")
    parallel: str = "runs one process"
    """How it runs one shard, or why one is all: completes "the cpu backend ..."."""
    max_shards: int = 1
    """More are refused."""
    max_context: Default[int] | None = None
    """Of texts; None: what the model was made for."""


def resolve(
    options: EngineOptions, model: ModelSpec, capabilities: Capabilities, defaults: Defaults
) -> ResolvedOptions:
    """See Plugin.resolve: for backends without pipelines and without options of their own."""
    _refuse_unserved(options, defaults)
    dtype, why_dtype = _dtype(options.dtype, capabilities, defaults)
    kv_dtype, why_kv_dtype = _kv_dtype(options.kv_dtype, dtype, capabilities, defaults)
    block_size, why_block_size = _block_size(options.block_size, capabilities, defaults)
    max_context, why_max_context = _max_context(options, model, capabilities, defaults)
    max_tokens, why_max_tokens = _max_tokens(options, max_context, capabilities, defaults)
    max_rows, why_max_rows = _count(
        "max_batch_rows", options.max_batch_rows, defaults.max_batch_rows
    )
    return ResolvedOptions(
        dtype=dtype,
        kv_dtype=kv_dtype,
        block_size=block_size,
        max_context=max_context,
        max_batch_tokens=max_tokens,
        max_batch_rows=max_rows,
        max_logprobs=defaults.max_logprobs.value,
        max_logit_bias=defaults.max_logit_bias.value,
        memory_utilisation=options.memory_utilisation,
        graph_memory=defaults.graph_memory.value,
        kv_bytes=options.kv_bytes,
        parallel=options.parallel,
        backend_options=dict(options.backend_options),
        reasons={
            "dtype": why_dtype,
            "kv_dtype": why_kv_dtype,
            "block_size": why_block_size,
            "max_context": why_max_context,
            "max_batch_tokens": why_max_tokens,
            "max_batch_rows": why_max_rows,
            "max_logprobs": defaults.max_logprobs.reason,
            "max_logit_bias": defaults.max_logit_bias.reason,
            "memory_utilisation": defaults.memory_utilisation,
            "graph_memory": defaults.graph_memory.reason,
            "kv_bytes": "by the free memory" if options.kv_bytes is None else ASKED_FOR,
            "parallel": f"the {defaults.backend} backend {defaults.parallel}"
            if options.parallel.tensor == 1
            else ASKED_FOR,
            "backend_options": "this backend has none",
        },
    )


def _refuse_unserved(options: EngineOptions, defaults: Defaults) -> None:
    backend = defaults.backend
    unknown = ", ".join(sorted(options.backend_options))
    if unknown:
        raise Incompatible(
            f"backend option {unknown}: the {backend} backend has none; leave it out"
        )
    _refuse_unserved_parallel(options.parallel, defaults)
    if not 0 < options.memory_utilisation <= 1:
        raise Incompatible(
            f"memory_utilisation {options.memory_utilisation}: a {defaults.memory_utilisation}; "
            "set it above 0 and to 1 at most"
        )
    if options.kv_bytes is not None and options.kv_bytes <= 0:
        raise Incompatible(f"kv_bytes {options.kv_bytes}: must be above 0; or leave it out")


def _refuse_unserved_parallel(parallel: ParallelOptions, defaults: Defaults) -> None:
    backend, most = defaults.backend, defaults.max_shards
    if parallel.pipeline != 1:
        raise Incompatible(
            f"{parallel.pipeline} pipeline stages: the {backend} backend has none; cut layers into shards instead"
        )
    if parallel.expert:
        raise Incompatible(
            f"spread experts: the {backend} backend cuts each expert into shards; leave the option out"
        )
    if parallel.tensor < 1:
        raise Incompatible(f"{parallel.tensor} shards: must be at least 1; or leave it out for 1")
    if parallel.tensor > most:
        cure = f"ask for at most {most}" if most > 1 else "ask for 1 shard"
        raise Incompatible(
            f"{parallel.tensor} shards: the {backend} backend {defaults.parallel}; {cure}"
        )


def _choose(name: str, asked: object, choices: Collection[object], defaults: Defaults) -> None:
    if asked not in choices:
        listed = ", ".join(map(str, choices))
        raise Incompatible(
            f"{name} {asked}: the {defaults.backend} backend serves {listed}; choose one of them"
        )


def _dtype(asked: str, capabilities: Capabilities, defaults: Defaults) -> tuple[str, str]:
    _choose("dtype", asked, ("auto", *sorted(capabilities.dtypes)), defaults)
    if asked != "auto":
        return asked, ASKED_FOR
    return defaults.dtype.value, defaults.dtype.reason


def _kv_dtype(
    asked: str, dtype: str, capabilities: Capabilities, defaults: Defaults
) -> tuple[str, str]:
    _choose("kv_dtype (--kv-cache-dtype)", asked, sorted(capabilities.kv_dtypes), defaults)
    return (dtype, "the model's") if asked == "auto" else (asked, ASKED_FOR)


def _block_size(
    asked: int | None, capabilities: Capabilities, defaults: Defaults
) -> tuple[int, str]:
    if asked is not None:
        _choose("block_size", asked, sorted(capabilities.block_sizes), defaults)
        return asked, ASKED_FOR
    return capabilities.block_sizes[0], defaults.block_size


def _max_context(
    options: EngineOptions, model: ModelSpec, capabilities: Capabilities, defaults: Defaults
) -> tuple[int, str]:
    asked, tokens = options.max_context, options.max_batch_tokens
    if asked is not None:
        if not 0 < asked <= model.max_context:
            raise Incompatible(
                f"max_context {asked} (--max-total-tokens): the model serves 1 to {model.max_context}; "
                "choose one of these"
            )
        return asked, ASKED_FOR
    chosen, reason = model.max_context, "what the model was made for"
    if defaults.max_context is not None and defaults.max_context.value < chosen:
        chosen, reason = defaults.max_context.value, defaults.max_context.reason
    if not capabilities.chunked_prefill and tokens is not None and 0 < tokens < chosen:
        return tokens, "a prompt is computed in one step, of max_batch_tokens at most"
    return chosen, reason


def _max_tokens(
    options: EngineOptions, max_context: int, capabilities: Capabilities, defaults: Defaults
) -> tuple[int, str]:
    asked = options.max_batch_tokens
    tokens, reason = _count("max_batch_tokens", asked, defaults.max_batch_tokens)
    if capabilities.chunked_prefill or tokens >= max_context:
        return tokens, reason
    if asked is None:
        return max_context, "a prompt is computed in one step, which must hold max_context"
    raise Incompatible(
        f"max_batch_tokens {asked}: the {defaults.backend} backend computes a prompt in one step, "
        f"which must hold max_context {max_context}; raise the one or lower the other"
    )


def _count(name: str, asked: int | None, default: Default[int]) -> tuple[int, str]:
    if asked is None:
        return default.value, default.reason
    if asked < 1:
        raise Incompatible(
            f"{name} {asked}: must be at least 1; or leave it out for {default.value}"
        )
    return asked, ASKED_FOR
