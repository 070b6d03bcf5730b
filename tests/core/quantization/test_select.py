from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from quantizers import Recipe, awq_recipe, fp8_recipe, gptq_recipe
from torch import Tensor

from chipset.backends.errors import Incompatible
from chipset.backends.formats import CheckpointFormat, Packed, Scheme, StoredTensor
from chipset.core.errors import ModelFormatError
from chipset.core.quantization.names import QUANTIZE_NAMES, UNBUILT
from chipset.core.quantization.select import FORMATS, choose_scheme

AWQ, GPTQ, FP8 = awq_recipe(64), gptq_recipe(64), fp8_recipe((128, 128))
LAYER = "model.layers.0.self_attn.q_proj"


class ForeignScheme(Scheme):
    """Stores nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def stored(
        self, module: str, in_features: int, out_features: int
    ) -> Mapping[str, StoredTensor] | None:
        return None

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:
        raise NotImplementedError


class ForeignFormat(CheckpointFormat):
    """A plugin's."""

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self, config: Mapping[str, object] | None) -> Scheme:
        return ForeignScheme(f"foreign {self.name}")


def choose(
    folder: Path,
    section: object,
    asked: str | None = None,
    *formats: CheckpointFormat,
    **options: bool,
) -> Scheme | None:
    config = folder / "config.json"
    config.write_text(json.dumps({} if section is None else {"quantization_config": section}))
    return choose_scheme(config, asked, formats, **options)


@pytest.mark.parametrize(
    ("section", "asked", "name"),
    [
        (AWQ.config, None, "awq"),
        (AWQ.config, "awq", "awq"),
        (GPTQ.config, None, "gptq"),
        (FP8.config, None, "fp8"),
        (fp8_recipe("row").config, None, "fp8"),
        (fp8_recipe("row").config, "fp8", "fp8"),
        (None, "fp8", "fp8"),
        (None, "int8", "int8"),
        (None, "int4", "int4"),
    ],
)
def test_a_format_is_detected_or_asked_for(
    tmp_path: Path, section: object, asked: str | None, name: str
) -> None:
    scheme = choose(tmp_path, section, asked)
    assert scheme is not None
    assert scheme.name == name


def test_a_plain_checkpoint_that_nobody_asks_to_quantise_is_plain(tmp_path: Path) -> None:
    assert choose(tmp_path, None) is None


@pytest.mark.parametrize("asked", ["gptq", "int4", "fp8"])
def test_a_flag_that_contradicts_the_checkpoint_is_refused(tmp_path: Path, asked: str) -> None:
    with pytest.raises(
        Incompatible, match=rf"--quantize {asked}: .* stored as awq .* leave --quantize out"
    ):
        choose(tmp_path, AWQ.config, asked)


@pytest.mark.parametrize("asked", ["awq", "gptq"])
def test_a_plain_checkpoint_cannot_be_read_as_a_format_of_files(tmp_path: Path, asked: str) -> None:
    with pytest.raises(Incompatible, match=rf"--quantize {asked} .* choose int4, int8 or fp8"):
        choose(tmp_path, None, asked)


@pytest.mark.parametrize("name", sorted(UNBUILT))
def test_what_is_not_built_yet_is_refused_by_name_with_the_cure(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        Incompatible, match=rf"--quantize {name} is not served yet.*{UNBUILT[name]}"
    ):
        choose(tmp_path, None, name)
    with pytest.raises(Incompatible, match=rf"quant_method {name} is not served yet"):
        choose(tmp_path, {"quant_method": name})


def test_an_unknown_name_lists_the_choices(tmp_path: Path) -> None:
    with pytest.raises(
        Incompatible, match="--quantize int5 is unknown; choose one of awq, gptq, fp8, int8, int4"
    ):
        choose(tmp_path, None, "int5")
    with pytest.raises(Incompatible, match="quant_method quark is unknown"):
        choose(tmp_path, {"quant_method": "quark"})


def test_the_formats_of_a_plugin_work_like_built_in_ones(tmp_path: Path) -> None:
    ternary = ForeignFormat("ternary")
    for section, asked in (({"quant_method": "ternary"}, None), (None, "ternary")):
        scheme = choose(tmp_path, section, asked, ternary)
        assert scheme is not None
        assert scheme.name == "foreign ternary"
    with pytest.raises(Incompatible, match=r"choose one of .*ternary"):
        choose(tmp_path, None, "int5", ternary)


@pytest.mark.parametrize("name", ["awq", "mxfp4", "fbgemm_fp8"])
def test_the_formats_of_a_plugin_come_first(tmp_path: Path, name: str) -> None:
    first, second = ForeignFormat(name), ForeignFormat(name)
    second.read = None  # type: ignore[method-assign,assignment]
    scheme = choose(tmp_path, {"quant_method": name}, None, first, second)
    assert scheme is not None
    assert scheme.name == f"foreign {name}"


def test_a_gguf_file_has_its_own_formats(tmp_path: Path) -> None:
    assert choose(tmp_path, None, weights_are_gguf=True) is None
    with pytest.raises(Incompatible, match="--quantize int4: a GGUF file"):
        choose(tmp_path, None, "int4", weights_are_gguf=True)


@pytest.mark.parametrize(
    ("recipe", "changed", "match"),
    [
        (AWQ, {"bits": 8}, "8 bits is not served, 4 are"),
        (AWQ, {"version": "gemv"}, "gemv is not served, gemm is"),
        (AWQ, {"version": "gemv_fast"}, "gemv_fast is not served"),
        (AWQ, {"zero_point": False}, "without zero points"),
        (GPTQ, {"bits": 3}, "3 bits is not served, 4 and 8 bits"),
        (GPTQ, {"bits": 2}, "2 bits is not served"),
        (GPTQ, {"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
        (GPTQ, {"is_marlin_format": True}, "checkpoint_format marlin"),
        (GPTQ, {"pack_dtype": "int16"}, "pack_dtype int16"),
        (GPTQ, {"dynamic": {"-:.*down.*": {}}}, "dynamic"),
        (GPTQ, {"lm_head": True}, "lm_head"),
        (FP8, {"fmt": "e5m2"}, "e5m2 is not served, e4m3 is"),
        (FP8, {"activation_scheme": "static"}, "blocks with static"),
    ],
)
def test_what_a_format_does_not_serve_is_named(
    tmp_path: Path, recipe: Recipe, changed: dict[str, Any], match: str
) -> None:
    with pytest.raises(Incompatible, match=rf"{match}.*fetch"):
        choose(tmp_path, {**recipe.config, **changed})


@pytest.mark.parametrize(
    ("recipe", "changed", "match"),
    [
        (AWQ, {"group_size": 0}, "group_size is 0"),
        (AWQ, {"group_size": "64"}, "group_size is '64'"),
        (GPTQ, {"group_size": 0}, "group_size is 0"),
        (GPTQ, {"bits": True}, "bits is True"),
        (GPTQ, {"desc_act": "no"}, "desc_act is 'no'"),
        (FP8, {"weight_block_size": [128]}, "weight_block_size is"),
        (FP8, {"weight_block_size": [0, 128]}, "weight_block_size is"),
        (FP8, {"activation_scheme": "sometimes"}, "activation_scheme is 'sometimes'"),
        (FP8, {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is"),
        (FP8, {"quant_method": 8}, "quant_method is 8"),
    ],
)
def test_nonsense_in_config_json_is_named(
    tmp_path: Path, recipe: Recipe, changed: dict[str, Any], match: str
) -> None:
    with pytest.raises(ModelFormatError, match=match):
        choose(tmp_path, {**recipe.config, **changed})


@pytest.mark.parametrize("recipe", [AWQ, GPTQ, FP8], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("listed", ["self_attn.q_proj", LAYER, "q_proj", "model.layers.0"])
def test_modules_that_were_not_converted_are_plain(
    tmp_path: Path, recipe: Recipe, listed: str
) -> None:
    scheme = choose(tmp_path, {**recipe.config, "modules_to_not_convert": [listed]})
    assert scheme is not None
    assert scheme.stored(LAYER, 64, 64) is None
    assert scheme.stored("model.layers.10.mlp.gate_proj", 64, 64) is not None


def test_a_router_may_be_plain_beside_gates_that_are_not(tmp_path: Path) -> None:
    scheme = choose(tmp_path, {**AWQ.config, "modules_to_not_convert": ["gate"]})
    assert scheme is not None
    assert scheme.stored("model.layers.0.block_sparse_moe.gate", 64, 64) is None
    assert scheme.stored("model.layers.0.mlp.gate_proj", 64, 64) is not None


def test_the_names_of_help_texts_are_those_of_the_formats() -> None:
    assert tuple(known.name for known in FORMATS) == QUANTIZE_NAMES


def test_the_names_are_known_without_torch() -> None:
    code = "import sys, chipset.core.quantization.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
