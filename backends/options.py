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
    """Ranks that share every layer."""
    pipeline: int = 1
    """Stages of layers."""
    expert: bool = False
    """Experts are spread over the tensor ranks rather than cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """What the user set; None or "auto" is left to the plugin."""

    dtype: str = "auto"
    """Of weights and activations, by torch's name."""
    kv_dtype: str = "auto"
    """`auto` is the model's."""
    block_size: int | None = None
    """Tokens a KV block."""
    max_context: int | None = None
    """Tokens of prompt and output together."""
    max_batch_tokens: int | None = None
    """Tokens a step computes."""
    max_batch_rows: int | None = None
    """Requests that run at once."""
    kv_bytes: int | None = None
    """For KV blocks, per device; None: by what is free."""
    memory_utilisation: float = 0.9
    """Share of the device's memory to use, above 0 and at most 1."""
    graph_memory: float = 0.1
    """Share of the device kept free for graphs; 0 where there are none."""
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    """Over how many ranks the model is cut."""
    backend_options: Mapping[str, str] = field(default_factory=dict)
    """Names from PluginInfo.options; checked by resolve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedOptions:
    """Nothing left to default; `reasons` says why each was chosen (printed at start)."""

    dtype: str
    """One of Capabilities.dtypes."""
    kv_dtype: str
    """One of Capabilities.kv_dtypes."""
    block_size: int
    """One of Capabilities.block_sizes."""
    max_context: int
    """At most the model's."""
    max_batch_tokens: int
    """At least max_context where prefill cannot be chunked."""
    max_batch_rows: int
    """Also the number of request slots; BatchPolicy.max_rows may be smaller (rounded to a bucket)."""
    max_logprobs: int
    """k of StepOutput.top_ids."""
    max_logit_bias: int
    """N of SamplingBatch.bias_ids."""
    memory_utilisation: float
    """Handed to KVCache.budget."""
    graph_memory: float
    """Share of the device kept free for graphs."""
    kv_bytes: int | None
    """Bytes of KV per device that the user fixed; the core's affair."""
    parallel: ParallelOptions
    """As asked for."""
    backend_options: Mapping[str, str]
    """Every name of PluginInfo.options, with its value."""
    reasons: Mapping[str, str]
    """By the name of the field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KVGroup:
    """Layers that share a block table: same kind, shape and lifetime.

    Most models have one group; sliding windows beside full attention are two. Groups are numbered 0, 1, … everywhere.
    """

    kind: Literal["full", "sliding", "latent", "state", "cross"]
    """full: all tokens are kept. sliding: the last `window`. Others: latent, recurrent state, cross attention."""
    layers: tuple[int, ...]
    """Their numbers in the model, ascending."""
    num_kv_heads: int
    """Of this rank."""
    head_size: int
    """Of keys."""
    value_size: int
    """Of values."""
    dtype: str
    """Of keys and values, never "auto". float8_e4m3fn, float8_e5m2: times AttentionParams' scales of the layer; int8:
    times a scale for each token and head, which attend finds as it writes."""
    window: int | None = None
    """Blocks left of it are given back: their table entries become 0, the others keep their index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """The static part of an attention layer, hashable; its tensors come apart, as AttentionParams."""

    num_heads: int
    """Hq of this rank."""
    num_kv_heads: int
    """Hkv of this rank; Hq / Hkv query heads share one, neighbours first."""
    head_size: int
    """D, of queries and keys."""
    value_size: int
    """Dv, of values and outputs."""
    scale: float
    """Of the scores, before anything else."""
    group: int
    """Number of the KV group."""
    causal: bool = True
    """A token sees none after it."""
    window: int | None = None
    """Tokens seen, itself included."""
    soft_cap: float | None = None
    """c: scores become c * tanh(score / c), before bias and mask."""
    sinks: bool = False
    """AttentionParams.sinks takes its share of each softmax and gives no value."""
    alibi: bool = False
    """AttentionParams.alibi_slopes times (key index - query index) is added to the scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """What a plugin may know of a model, as one rank holds it."""

    architecture: str
    """Such as LlamaForCausalLM."""
    num_layers: int
    """Of this stage."""
    hidden_size: int
    """H"""
    vocab_size: int
    """V, whole."""
    max_context: int
    """Tokens; before resolve what the model was made for, in Launch what is served."""
    dtype: str
    """Of weights and activations."""
    weight_bytes: int
    """Of this rank."""
    groups: tuple[KVGroup, ...]
    """Of KV, by number."""
    attention: tuple[AttentionSpec, ...]
    """The distinct ones."""
    packed: bool = False
    """Whether linear layers come packed, so that another dtype may suit whatever multiplies by them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are drawn; the defaults are greedy and change nothing."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """Only the k most likely tokens; None: all."""
    top_p: float = 1.0
    """Only the fewest most likely tokens whose probabilities reach this."""
    min_p: float = 0.0
    """Only tokens at least this likely, as a share of the likeliest."""
    typical_p: float = 1.0
    """Only the fewest tokens of most typical information whose probabilities reach this."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output."""
    frequency_penalty: float = 0.0
    """Times the count of a token in the output, taken from its logit."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens in the output."""
    seed: int | None = None
    """64 bits; the core draws one where the user gave none."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids."""
    num_logprobs: int | None = None
    """None: no logprobs. n: that of the drawn token and of the n best."""
    watermark: bool = False
    """TGI's."""

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
