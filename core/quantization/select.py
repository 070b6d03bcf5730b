"""Which format a checkpoint is stored in, or is to be brought into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ...backends.errors import Incompatible
from ...backends.formats import CheckpointFormat, Scheme
from ..models.fields import Fields
from .awq import AwqFormat
from .fp8 import Fp8Format
from .gptq import GptqFormat
from .names import UNBUILT
from .on_the_fly import OnTheFlyFormat

FORMATS: Final[Sequence[CheckpointFormat]] = (
    AwqFormat(),
    GptqFormat(),
    Fp8Format(),
    OnTheFlyFormat("int8"),
    OnTheFlyFormat("int4"),
)
"""Built in."""
_SAME: Final[Mapping[str, str]] = {"fbgemm_fp8": "fp8"}
"""A quant_method and the format that reads it."""


def choose_scheme(
    config: Path,
    asked: str | None,
    formats: Sequence[CheckpointFormat],
    *,
    weights_are_gguf: bool = False,
) -> Scheme | None:
    """How the layers of a checkpoint are stored; None: plain, or as the blocks of its GGUF file.

    `config`: config.json. `asked`: what --quantize says. `formats`: those of a plugin, which come before the built-in
    ones. Raises Incompatible for what is not served, with the cure, and ModelFormatError.
    """
    if weights_are_gguf:
        if asked is not None:
            raise Incompatible(
                f"--quantize {asked}: a GGUF file has formats of its own, which are detected; leave --quantize out"
            )
        return None
    section = Fields.load(config).section("quantization_config")
    by_name = {known.name: known for known in (*FORMATS, *reversed(formats))}
    if section is None:
        return None if asked is None else _find(asked, f"--quantize {asked}", by_name).read(None)
    method = section.text("quant_method")
    name = method if method in by_name else _SAME.get(method, method)
    if asked not in (None, method, name):
        raise Incompatible(
            f"--quantize {asked}: the checkpoint is stored as {method} (quantization_config in {config}); "
            f"leave --quantize out, or fetch another checkpoint"
        )
    return _find(name, f"quantization_config: quant_method {method}", by_name).read(
        section.values()
    )


def _find(name: str, says: str, by_name: Mapping[str, CheckpointFormat]) -> CheckpointFormat:
    if name in by_name:
        return by_name[name]
    choices = ", ".join(by_name)
    if name in UNBUILT:
        raise Incompatible(f"{says} is not served yet, {choices} are; {UNBUILT[name]}")
    raise Incompatible(f"{says} is unknown; choose one of {choices}, or a checkpoint stored as one")
