"""What a family is, and how to read the keys that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from ..errors import UnsupportedArchitecture
from ..layers.rope import Rope
from .config import ModelConfig
from .fields import Fields
from .names import TensorNames
from .rope import MAX_POSITIONS, read_rope

MAX_LAYERS: Final = 2**10
MAX_VOCAB: Final = 2**26
MAX_HIDDEN: Final = 2**20
MAX_HEADS: Final = 2**14

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu"]

ACTIVATIONS: Final[Mapping[str, Activation]] = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How one architecture is read."""

    read: Callable[[Fields, Family], ModelConfig]
    names: TensorNames
    rope_theta: float = 10_000.0
    """Defaults of Transformers' configuration class, for keys that config.json leaves out."""
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    head_size: int | None = None
    """None: hidden_size / num_attention_heads."""
    activation_key: str = "hidden_act"
    activation: str = "silu"
    partial_rotary: bool = False
    """partial_rotary_factor is obeyed."""
    neutral: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Keys that would change the model and are not served, with the values that do not."""


def read_base(fields: Fields, family: Family) -> ModelConfig:
    """What all families but BLOOM share: Llama's key names, full attention, no rope yet."""
    hidden = fields.integer("hidden_size", high=MAX_HIDDEN)
    heads = fields.integer("num_attention_heads", high=MAX_HEADS)
    kv_heads = fields.integer("num_key_value_heads", high=heads, default=heads)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if family.head_size is None and not fields.has("head_dim") and hidden % heads:
        raise fields.wrong("hidden_size", f"a multiple of num_attention_heads, {heads}")
    vocab = fields.integer("vocab_size", high=MAX_VOCAB)
    head_size = fields.integer("head_dim", high=2**13, default=family.head_size or hidden // heads)
    layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    bias = fields.boolean("attention_bias", default=False)
    return ModelConfig(
        architecture=fields.texts("architectures")[0],
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        intermediate_size=fields.integer("intermediate_size", high=2**22),
        max_positions=fields.integer("max_position_embeddings", high=MAX_POSITIONS),
        norm_eps=fields.number("rms_norm_eps", default=family.norm_eps),
        activation=_read_activation(fields, family),
        qkv_bias=bias,
        o_bias=bias,
        tied_embeddings=fields.boolean("tie_word_embeddings", default=family.tied_embeddings),
        windows=(None,) * layers,
        attention_scale=head_size**-0.5,
        bos_id=next(iter(fields.ids("bos_token_id", vocab_size=vocab)), None),
        eos_ids=fields.ids("eos_token_id", vocab_size=vocab),
    )


def _read_activation(fields: Fields, family: Family) -> Activation:
    name = fields.text(family.activation_key, default=family.activation)
    if name not in ACTIVATIONS:
        raise UnsupportedArchitecture(
            f"{fields.source}: {family.activation_key} {name!r} is not served; choose a model with one of "
            + ", ".join(ACTIVATIONS)
        )
    return ACTIVATIONS[name]


def read_one_rope(
    fields: Fields,
    family: Family,
    base: ModelConfig,
    *,
    original_positions: int | None = None,
) -> Rope:
    """Of a family with one rope."""
    parameters = fields.section(fields.first("rope_scaling", "rope_parameters"))
    if fields.has("original_max_position_embeddings"):
        original_positions = fields.integer(
            "original_max_position_embeddings", low=2, high=MAX_POSITIONS
        )
    return read_rope(
        fields,
        parameters,
        head_size=base.head_size,
        max_positions=base.max_positions,
        theta=fields.number("rope_theta", default=family.rope_theta),
        partial_factor=_read_partial(fields, parameters, family),
        original_positions=original_positions,
    )


def _read_partial(fields: Fields, parameters: Fields | None, family: Family) -> float:
    """Share of each head that is rotated."""
    factor = fields.number("partial_rotary_factor", default=1.0)
    if parameters is not None:
        factor = parameters.number("partial_rotary_factor", default=factor)
    if factor != 1 and not family.partial_rotary:
        raise UnsupportedArchitecture(
            f"{fields.source}: partial_rotary_factor {factor} is not served for this architecture; choose another model"
        )
    return factor


def read_window(fields: Fields, *, default: int | None = None) -> int | None:
    """Null is none; absent is the default of Transformers' configuration class."""
    if fields.is_absent("sliding_window"):
        return default
    if not fields.has("sliding_window"):
        return None
    return fields.integer("sliding_window", high=MAX_POSITIONS)


def layer_windows(
    fields: Fields, num_layers: int, window: int | None, slides: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """Per layer, from layer_types or, where there are none, from the family's rule."""
    kinds = fields.texts("layer_types") or tuple(
        "sliding_attention" if slides(layer) else "full_attention" for layer in range(num_layers)
    )
    if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise fields.wrong("layer_types", f"{num_layers} times sliding_attention or full_attention")
    if window is None and "sliding_attention" in kinds:
        raise fields.wrong("sliding_window", "a whole number, as layers of layer_types slide")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_soft_cap(fields: Fields, key: str, default: float | None) -> float | None:
    """Null is none; absent is the default of Transformers' configuration class."""
    if fields.is_absent(key):
        return default
    return fields.number(key) if fields.has(key) else None


def equal_windows(fields: Fields, num_layers: int, window: int | None) -> tuple[int | None, ...]:
    """Of a family whose layers are all alike: layer_types that say otherwise are refused."""
    kind = "full_attention" if window is None else "sliding_attention"
    if not set(fields.texts("layer_types")) <= {kind}:
        raise UnsupportedArchitecture(
            f"{fields.source}: layer_types other than {kind} are not served for this architecture; "
            "choose another model"
        )
    return (window,) * num_layers
