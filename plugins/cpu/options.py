"""From what the user set to what a model gets on this CPU, every choice with its reason."""

from __future__ import annotations

from collections.abc import Collection

from ...backends.capabilities import Capabilities
from ...backends.errors import Incompatible
from ...backends.options import EngineOptions, ModelSpec, ResolvedOptions
from .cpuinfo import multiplies_bfloat16

MAX_BATCH_TOKENS = 512
MAX_BATCH_ROWS = 64
MAX_LOGPROBS = 20
"""OpenAI's limit of top_logprobs."""
MAX_LOGIT_BIAS = 320
ASKED_FOR = "asked for"


def resolve(
    options: EngineOptions, model: ModelSpec, capabilities: Capabilities, architecture: str
) -> ResolvedOptions:
    """See Plugin.resolve."""
    _refuse_unserved(options)
    dtype, why_dtype = _dtype(options.dtype, capabilities, architecture)
    kv_dtype, why_kv_dtype = _kv_dtype(options.kv_dtype, dtype, capabilities)
    block_size, why_block_size = _block_size(options.block_size, capabilities)
    max_context, why_max_context = _max_context(options.max_context, model)
    max_tokens, why_max_tokens = _count(
        "max_batch_tokens",
        options.max_batch_tokens,
        MAX_BATCH_TOKENS,
        "a token of a larger step costs as much, and decoding rows wait longer for it",
    )
    max_rows, why_max_rows = _count(
        "max_batch_rows",
        options.max_batch_rows,
        MAX_BATCH_ROWS,
        "a step takes longer with every row; this many still gain from sharing it",
    )
    return ResolvedOptions(
        dtype=dtype,
        kv_dtype=kv_dtype,
        block_size=block_size,
        max_context=max_context,
        max_batch_tokens=max_tokens,
        max_batch_rows=max_rows,
        max_logprobs=MAX_LOGPROBS,
        max_logit_bias=MAX_LOGIT_BIAS,
        memory_utilisation=options.memory_utilisation,
        graph_memory=0.0,
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
            "max_logprobs": "what OpenAI's API allows",
            "max_logit_bias": "room for a few hundred tokens a request",
            "memory_utilisation": "share of the memory that is free once the weights are loaded",
            "graph_memory": "nothing is compiled here",
            "kv_bytes": "by the free memory" if options.kv_bytes is None else ASKED_FOR,
            "parallel": "one process uses all cores",
            "backend_options": "this backend has none",
        },
    )


def _refuse_unserved(options: EngineOptions) -> None:
    unknown = ", ".join(sorted(options.backend_options))
    if unknown:
        raise Incompatible(f"backend option {unknown}: the cpu backend has none; leave it out")
    shards = options.parallel.tensor * options.parallel.pipeline
    if shards != 1:
        raise Incompatible(
            f"{shards} shards: the cpu backend runs one process that uses all cores; ask for 1 shard"
        )
    if not 0 < options.memory_utilisation <= 1:
        raise Incompatible(
            f"memory_utilisation {options.memory_utilisation}: a share of the free memory; "
            "set it above 0 and to 1 at most"
        )
    if options.kv_bytes is not None and options.kv_bytes <= 0:
        raise Incompatible(f"kv_bytes {options.kv_bytes}: must be above 0; or leave it out")


def _choose(name: str, asked: object, choices: Collection[object]) -> None:
    if asked not in choices:
        listed = ", ".join(map(str, choices))
        raise Incompatible(f"{name} {asked}: the cpu backend serves {listed}; choose one of them")


def _dtype(asked: str, capabilities: Capabilities, architecture: str) -> tuple[str, str]:
    _choose("dtype", asked, ("auto", *sorted(capabilities.dtypes)))
    if asked != "auto":
        return asked, ASKED_FOR
    if multiplies_bfloat16(architecture):
        return (
            "bfloat16",
            f"{architecture} multiplies bfloat16, which halves what memory must bring",
        )
    return "float32", f"{architecture} has no instruction that multiplies bfloat16"


def _kv_dtype(asked: str, dtype: str, capabilities: Capabilities) -> tuple[str, str]:
    _choose("kv_dtype", asked, sorted(capabilities.kv_dtypes))
    return (dtype, "the model's") if asked == "auto" else (asked, ASKED_FOR)


def _block_size(asked: int | None, capabilities: Capabilities) -> tuple[int, str]:
    if asked is not None:
        _choose("block_size", asked, sorted(capabilities.block_sizes))
        return asked, ASKED_FOR
    return capabilities.block_sizes[0], "short tables, and little waste at the end of a text"


def _max_context(asked: int | None, model: ModelSpec) -> tuple[int, str]:
    if asked is None:
        return model.max_context, "what the model was made for"
    if not 0 < asked <= model.max_context:
        raise Incompatible(
            f"max_context {asked} (--max-total-tokens): the model serves 1 to {model.max_context}; choose one of these"
        )
    return asked, ASKED_FOR


def _count(name: str, asked: int | None, default: int, reason: str) -> tuple[int, str]:
    if asked is None:
        return default, reason
    if asked < 1:
        raise Incompatible(f"{name} {asked}: must be at least 1; or leave it out for {default}")
    return asked, ASKED_FOR
