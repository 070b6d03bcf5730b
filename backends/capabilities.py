"""What a backend can do, as questions the core may ask; the core branches on these and on nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """Every default is the humblest answer: a new field never turns anything on."""

    device_type: str
    """Torch device string without index."""
    graphs: Literal["none", "capture", "compile", "ahead_of_time"] = "none"
    """How steps become graphs."""
    dtypes: frozenset[str] = frozenset({"float32"})
    """Which dtypes may weights and activations have?"""
    kv_dtypes: frozenset[str] = frozenset({"auto"})
    """Which dtypes may the KV cache have? "auto" is the model's."""
    fp8_max: float | None = None
    """Largest finite fp8 value: 448, or 240 on devices with the fnuz form."""
    block_sizes: tuple[int, ...] = (16,)
    """Tokens a KV block may hold, preferred first."""
    kv_budget: Literal["profile", "predict"] = "profile"
    """Is KV memory found by running the largest step, or fixed before anything is compiled?"""
    chunked_prefill: bool = False
    """May a prompt be computed over several steps?"""
    prefix_cache: bool = False
    """May a request start from blocks that another one wrote?"""
    preemption: bool = False
    """May a running request be put back? If not, the scheduler reserves its worst case at admission."""
    overlapped_steps: bool = False
    """May step n + 1 start before step n is fetched?"""
    fused_draw: bool = False
    """Are model and draw one graph (one launch a step) rather than two (fewer graphs)?"""
    attention: frozenset[str] = frozenset()
    """Which variants beside plain causal attention?
    window, soft_cap, sinks, alibi, chunk, spans, tree, latent, cross."""
    features: frozenset[str] = frozenset()
    """Which features of drawing (see SamplingBatch)? sampled, filters, penalties, bias, bitmask, targets, logprobs,
    watermark."""
    collectives: frozenset[str] = frozenset()
    """all_reduce, all_gather, reduce_scatter, all_to_all, send_receive."""
