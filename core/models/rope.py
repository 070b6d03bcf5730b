"""config.json's rotary keys, in the layouts of Transformers 4 and 5, read into a Rope."""

from __future__ import annotations

import math

from ..errors import ModelFormatError, UnsupportedArchitecture
from ..layers.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)
from .fields import Fields

MAX_POSITIONS = 2**27


def read_rope(
    fields: Fields,
    parameters: Fields | None,
    *,
    head_size: int,
    max_positions: int,
    theta: float,
    partial_factor: float = 1.0,
    original_positions: int | None = None,
) -> Rope:
    """`parameters` is rope_scaling (4) or rope_parameters (5); what it leaves out comes from the arguments.

    `fields` is what errors name.

    `original_positions` overrules the key of `parameters`, as Transformers does where the config has one at the top.
    Raises ModelFormatError, and UnsupportedArchitecture for a kind of rope that is not served.
    """
    parameters = parameters or Fields({}, fields.source)
    rotary_size = int(head_size * partial_factor)
    if rotary_size < 2 or rotary_size % 2 or rotary_size > head_size:
        raise ModelFormatError(
            f"{fields.source}: heads of {head_size} and a rotated part of {partial_factor} give {rotary_size} "
            "rotated dimensions, which must be even and fit in the head; fetch the model anew"
        )
    original = original_positions or parameters.integer(
        "original_max_position_embeddings", low=2, high=MAX_POSITIONS, default=max_positions
    )
    scaling = _read_scaling(parameters, rotary_size, original)
    return Rope(
        theta=_theta(parameters, theta),
        rotary_size=rotary_size,
        scaling=scaling,
        attention_factor=_attention_factor(parameters, scaling, max_positions),
    )


def rope_kind(parameters: Fields | None) -> str:
    """The name of the kind: rope_type, or type in old configs."""
    if parameters is None:
        return "default"
    return parameters.text(parameters.first("rope_type", "type"), default="default")


def _theta(parameters: Fields, default: float) -> float:
    theta = parameters.number("rope_theta", default=default)
    if theta <= 1:
        raise parameters.wrong("rope_theta", "above 1")
    return theta


def _read_scaling(parameters: Fields, rotary_size: int, original: int) -> RopeScaling | None:
    match kind := rope_kind(parameters):
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=parameters.number("factor"))
        case "llama3":
            low = parameters.number("low_freq_factor")
            high = parameters.number("high_freq_factor")
            if low >= high:
                raise parameters.wrong("low_freq_factor", f"below high_freq_factor, {high}")
            return Llama3Scaling(
                factor=parameters.number("factor"),
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_positions=original,
            )
        case "yarn":
            return YarnScaling(
                factor=parameters.number("factor"),
                beta_fast=parameters.number("beta_fast", default=32.0),
                beta_slow=parameters.number("beta_slow", default=1.0),
                truncate=parameters.boolean("truncate", default=True),
                original_max_positions=original,
            )
        case "longrope" | "su":
            return LongRopeScaling(
                short_factor=parameters.numbers("short_factor", length=rotary_size // 2),
                long_factor=parameters.numbers("long_factor", length=rotary_size // 2),
                original_max_positions=original,
            )
        case _:
            raise UnsupportedArchitecture(
                f"{parameters.source}: rope type {kind!r} is not served; served are default, linear, llama3, yarn "
                "and longrope; choose another model"
            )


def _attention_factor(parameters: Fields, scaling: RopeScaling | None, max_positions: int) -> float:
    """As YaRN and LongRoPE recommend it, unless the config sets it."""
    if parameters.has("attention_factor") and isinstance(scaling, YarnScaling | LongRopeScaling):
        return parameters.number("attention_factor")
    if isinstance(scaling, YarnScaling):
        if parameters.has("mscale") and parameters.has("mscale_all_dim"):
            mscale, all_dims = parameters.number("mscale"), parameters.number("mscale_all_dim")
            return _yarn_factor(scaling.factor, mscale) / _yarn_factor(scaling.factor, all_dims)
        return _yarn_factor(scaling.factor)
    if isinstance(scaling, LongRopeScaling):
        original = scaling.original_max_positions
        factor = parameters.number("factor", default=max_positions / original)
        if factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0


def _yarn_factor(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
