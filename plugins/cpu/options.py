"""From what the user set to what a model gets on this CPU, every choice with its reason."""

from __future__ import annotations

from ...backends.reference.resolve import Default, Defaults
from .cpuinfo import multiplies_bfloat16

MAX_RANKS = 64
"""Processes of a host at most."""


def defaults(architecture: str, *, packed: bool) -> Defaults:
    """On a CPU of that architecture; `packed`: for a model whose weights are."""
    return Defaults(
        backend="cpu",
        dtype=_dtype(architecture, packed=packed),
        block_size="short tables, and little waste at the end of a text",
        max_batch_tokens=Default(
            value=512,
            reason="a token of a larger step costs as much, and decoding rows wait longer for it",
        ),
        max_batch_rows=Default(
            value=64,
            reason="a step takes longer with every row; this many still gain from sharing it",
        ),
        max_logprobs=Default(value=20, reason="what OpenAI's API allows"),
        max_logit_bias=Default(value=320, reason="room for a few hundred tokens a request"),
        memory_utilisation="share of the memory that is free once the weights are loaded",
        graph_memory=Default(value=0.0, reason="nothing is compiled here"),
        parallel="runs one process that uses all cores unless asked for more",
        max_shards=MAX_RANKS,
    )


def _dtype(architecture: str, *, packed: bool) -> Default[str]:
    if packed:
        reason = "torch multiplies by packed weights several times as fast as in float32"
        return Default(value="bfloat16", reason=reason)
    if multiplies_bfloat16(architecture):
        reason = f"{architecture} multiplies bfloat16, which halves what memory must bring"
        return Default(value="bfloat16", reason=reason)
    reason = f"{architecture} has no instruction that multiplies bfloat16"
    return Default(value="float32", reason=reason)
