"""What a plugin may know of a model, before any weight is read. No torch here."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from ...backends.options import AttentionSpec, KVGroup, ModelSpec
from .config import ModelConfig
from .shard import WHOLE, Shard
from .tensors import checkpoint_layout

DTYPE_BYTES: Final = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})


def model_spec(
    config: ModelConfig,
    *,
    dtype: str,
    kv_dtype: str = "auto",
    max_context: int | None = None,
    shard: Shard = WHOLE,
    packed: bool = False,
) -> ModelSpec:
    """The model as one rank holds it; all ranks hold parts of one size.

    Called twice at start: with any dtype for Plugin.resolve to look at, then with the resolved options. `kv_dtype`
    "auto" is `dtype`; `max_context` None is all that the model is made for. A window as long as any text is none.
    """
    max_context = config.max_positions if max_context is None else max_context
    windows = [None if w is None or w >= max_context else w for w in config.windows]
    kinds = list(dict.fromkeys(windows))
    num_heads = shard.heads(config.num_heads, config.num_kv_heads).size
    num_kv_heads = shard.kv_heads(config.num_kv_heads).size
    return ModelSpec(
        architecture=config.architecture,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_context=max_context,
        dtype=dtype,
        weight_bytes=checkpoint_layout(config, shard).num_parameters * DTYPE_BYTES[dtype],
        groups=tuple(
            KVGroup(
                kind="full" if window is None else "sliding",
                layers=tuple(i for i, of_layer in enumerate(windows) if of_layer == window),
                num_kv_heads=num_kv_heads,
                head_size=config.head_size,
                value_size=config.head_size,
                dtype=dtype if kv_dtype == "auto" else kv_dtype,
                window=window,
            )
            for window in kinds
        ),
        attention=tuple(
            AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_size=config.head_size,
                value_size=config.head_size,
                scale=config.attention_scale,
                group=group,
                window=window,
                soft_cap=config.attention_soft_cap,
                alibi=config.alibi,
            )
            for group, window in enumerate(kinds)
        ),
        packed=packed,
    )


def layer_attention(spec: ModelSpec) -> tuple[AttentionSpec, ...]:
    """Per layer."""
    of_group = {attention.group: attention for attention in spec.attention}
    of_layer = {
        layer: of_group[number]
        for number, group in enumerate(spec.groups)
        for layer in group.layers
    }
    return tuple(of_layer[layer] for layer in range(spec.num_layers))
