"""What a model is: every flag of the one decoder, in no checkpoint's dialect. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..layers.rope import Rope


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only language model. Defaults are Llama's."""

    architecture: str
    """As config.json names it; also decides the names of the checkpoint's tensors."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    """Of one expert where there are experts."""
    max_positions: int
    """Longest text that the model is made for."""

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float
    norm_offset: float = 0.0
    """Added to the weight of every RMS norm (Gemma: 1)."""
    norm_weight_in_float: bool = False
    """The weight multiplies in float32, before the result is rounded (Gemma)."""
    norm_placement: Literal["pre", "sandwich"] = "pre"
    """pre: before attention and MLP; sandwich: after each as well, before the residual is added."""

    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    """down(activation(gate) * up) rather than down(activation(up))."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    tied_embeddings: bool = False
    embedding_norm: bool = False
    embedding_multiplier: float = 1.0
    """Rounded to the model's dtype before use."""

    rope: Rope | None = None
    local_rope: Rope | None = None
    """Of the layers that have a window; None: `rope`."""
    alibi: bool = False
    windows: tuple[int | None, ...]
    """Per layer: tokens seen, itself included; None = all."""
    attention_scale: float
    """Multiplies the scores."""
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    qk_norm: bool = False
    """RMS norm over each head of q and k, before the rotation."""

    num_experts: int = 0
    experts_per_token: int = 0
    normalise_experts: bool = True
    """The weights of a token's experts sum to 1."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def layer_rope(self, layer: int) -> Rope | None:
        """The rotation of `layer`."""
        if self.local_rope is not None and self.windows[layer] is not None:
            return self.local_rope
        return self.rope
