"""Values of the core that occur in the contract's signatures: options, the model as a rank holds it, sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

BACKENDS = ("cpu", "cuda", "rocm", "gaudi", "neuron", "tpu")
"""What this project sets out to serve; those without a plugin yet are refused by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelOptions:
    """Over how many ranks a model is cut."""

    tensor: int = 1
    pipeline: int = 1
    expert: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """What the user set; None or "auto" is left to the plugin."""

    dtype: str = "auto"
    kv_dtype: str = "auto"
    block_size: int | None = None
    max_context: int | None = None
    max_batch_tokens: int | None = None
    max_batch_rows: int | None = None
    kv_bytes: int | None = None
    memory_utilisation: float = 0.9
    graph_memory: float = 0.1
    """Share of the device kept free for graphs; 0 where there are none."""
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    backend_options: Mapping[str, str] = field(default_factory=dict)
    """Names from PluginInfo.options; checked by resolve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedOptions:
    """Nothing left to default; `reasons` says why each was chosen (printed at start)."""

    dtype: str
    kv_dtype: str
    block_size: int
    max_context: int
    max_batch_tokens: int
    """At least max_context where prefill cannot be chunked."""
    max_batch_rows: int
    """Also the number of request slots; BatchPolicy.max_rows may be smaller (rounded to a bucket)."""
    max_logprobs: int
    """k of StepOutput.top_ids."""
    max_logit_bias: int
    """N of SamplingBatch.bias_ids."""
    memory_utilisation: float
    graph_memory: float
    kv_bytes: int | None
    """Bytes of KV per device that the user fixed; the core's affair."""
    parallel: ParallelOptions
    backend_options: Mapping[str, str]
    reasons: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class KVGroup:
    """Layers that share a block table: same kind, shape and lifetime.

    Most models have one group; sliding windows beside full attention are two. Groups are numbered 0, 1, … everywhere.
    """

    kind: Literal["full", "sliding", "latent", "state", "cross"]
    layers: tuple[int, ...]
    num_kv_heads: int
    """Of this rank."""
    head_size: int
    value_size: int
    dtype: str
    """Never "auto"."""
    window: int | None = None
    """Blocks left of it are given back: their table entries become 0, the others keep their index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """The static part of an attention layer, hashable; its tensors come apart, as AttentionParams."""

    num_heads: int
    """Hq of this rank."""
    num_kv_heads: int
    head_size: int
    value_size: int
    scale: float
    group: int
    """Number of the KV group."""
    causal: bool = True
    window: int | None = None
    """Tokens seen, itself included."""
    soft_cap: float | None = None
    sinks: bool = False
    alibi: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """What a plugin may know of a model, as one rank holds it."""

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context: int
    dtype: str
    weight_bytes: int
    """Of this rank."""
    groups: tuple[KVGroup, ...]
    attention: tuple[AttentionSpec, ...]
    """The distinct ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are drawn; the defaults are greedy and change nothing."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    """64 bits; the core draws one where the user gave none."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None
    """None: no logprobs. n: that of the drawn token and of the n best."""
    watermark: bool = False

    @property
    def features(self) -> frozenset[str]:
        """The features of drawing (see SamplingBatch) that these parameters need."""
        filters = self.top_k is not None or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        needs = {
            "sampled": self.temperature > 0,
            "filters": self.temperature > 0 and filters,
            "penalties": penalties != (1, 0, 0),
            "bias": bool(self.logit_bias),
            "logprobs": self.num_logprobs is not None,
            "watermark": self.watermark,
        }
        return frozenset(name for name, needed in needs.items() if needed)
