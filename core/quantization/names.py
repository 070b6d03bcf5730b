"""Names that --quantize takes, and those it refuses. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

QUANTIZE_NAMES: Final = ("awq", "gptq", "fp8", "int8", "int4")
"""Built in; a plugin may bring others."""

_ON_THE_FLY: Final = "choose int8, int4 or fp8, which are made while loading"
UNBUILT: Final[Mapping[str, str]] = {
    "bitsandbytes": f"{_ON_THE_FLY}, with a plain checkpoint",
    "bitsandbytes-fp4": f"{_ON_THE_FLY}, with a plain checkpoint",
    "bitsandbytes-nf4": f"{_ON_THE_FLY}, with a plain checkpoint",
    "compressed-tensors": "fetch a checkpoint stored as awq, gptq or fp8, or a plain one",
    "eetq": f"{_ON_THE_FLY}, with a plain checkpoint",
    "exl2": "fetch a checkpoint stored as awq, gptq or fp8, or a plain one",
    "marlin": "fetch a checkpoint stored as awq or gptq",
    "mxfp4": "fetch a checkpoint stored as awq, gptq or fp8, or a plain one",
}
"""By name, the cure. The names are those of TGI and of quant_method in config.json."""
