from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from chipset.core.errors import ModelFormatError, UnsupportedArchitecture
from chipset.core.layers.rope import LongRopeScaling
from chipset.core.models.config import ModelConfig
from chipset.core.models.families import FAMILIES, load_config, read_config
from chipset.core.models.fields import MAX_BYTES, Fields
from chipset.core.models.spec import model_spec

from .cases import CASES

REQUIRED = {
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "n_layer",
    "n_head",
}

DEFAULTS_NOT_TAKEN = {
    "num_key_value_heads",  # Transformers' defaults are counts of one model of the family
    "bos_token_id",  # the tokenizer's and generation_config.json's say more than a default
    "eos_token_id",
}


def read(values: Mapping[str, object]) -> ModelConfig:
    return read_config(Fields(values, "config.json"))


def written(architecture: str, **given: object) -> dict[str, Any]:
    """The config.json that Transformers writes."""
    config = getattr(transformers, architecture).config_class(**given)
    return {**json.loads(config.to_json_string()), "architectures": [architecture]}


def tiny(architecture: str) -> dict[str, Any]:
    case = next(case for case in CASES if case.architecture == architecture)
    return written(architecture, **case.settings)


@pytest.fixture(params=FAMILIES)
def architecture(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_sizes_are_those_of_transformers(architecture: str) -> None:
    theirs = getattr(transformers, architecture).config_class()
    ours = read(written(architecture))
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == getattr(theirs, "num_key_value_heads", ours.num_heads)
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    if architecture != "BloomForCausalLM":
        assert ours.max_positions == theirs.max_position_embeddings
        assert ours.norm_eps == theirs.rms_norm_eps


def test_what_a_config_leaves_out_is_what_transformers_takes(architecture: str) -> None:
    full = written(architecture)
    if architecture == "Qwen3ForCausalLM":  # windows show only where they are used
        full |= {"use_sliding_window": True, "sliding_window": 4096, "layer_types": None}
        left = {"use_sliding_window"}
    else:
        left = set()
    for key in set(full) - REQUIRED - DEFAULTS_NOT_TAKEN - left:
        if full[key] is not None:
            assert read({k: v for k, v in full.items() if k != key}) == read(full), key


@pytest.mark.parametrize("architecture", [name for name in FAMILIES if name != "BloomForCausalLM"])
def test_rope_of_transformers_4_reads_like_that_of_5(architecture: str) -> None:
    new = tiny(architecture)
    old = dict(new)
    parameters = dict(old.pop("rope_parameters"))
    if architecture == "Gemma3ForCausalLM":
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = dict(parameters["full_attention"])
    old["rope_theta"] = parameters.pop("rope_theta")
    if "partial_rotary_factor" in parameters:
        old["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    kind = parameters.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    assert read(old) == read(new)


def test_phi3_calls_longrope_by_older_names() -> None:
    values = tiny("Phi3ForCausalLM")
    config = read(values)
    assert config.rope is not None
    assert isinstance(config.rope.scaling, LongRopeScaling)
    for name in ("su", "yarn"):
        values["rope_parameters"]["rope_type"] = name
        assert read(values) == config


def test_gemma3_patterns_read_like_layer_types() -> None:
    values = tiny("Gemma3ForCausalLM")
    by_types = read(
        {**values, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    )
    by_pattern = read({**values, "layer_types": None, "sliding_window_pattern": 2})
    assert by_types == by_pattern


def test_bloom_reads_the_hubs_older_keys() -> None:
    values = tiny("BloomForCausalLM")
    older = dict(values)
    older["n_embed"] = older.pop("hidden_size")
    older["num_attention_heads"] = older.pop("n_head")
    assert read({**older, "n_inner": None}) == read(values)


def test_eos_may_be_one_id_or_several_or_none() -> None:
    values = tiny("LlamaForCausalLM")
    assert read({**values, "eos_token_id": 5}).eos_ids == (5,)
    assert read({**values, "eos_token_id": [5, 7]}).eos_ids == (5, 7)
    assert read({**values, "eos_token_id": None}).eos_ids == ()
    assert read({**values, "eos_token_id": [5, 97]}).eos_ids == (5,)  # 97 is past the vocabulary


def test_keys_that_name_code_change_nothing(architecture: str) -> None:
    values = tiny(architecture)
    code = {
        "auto_map": {"AutoModelForCausalLM": "evil--evil.Evil"},
        "_attn_implementation_internal": "evil/evil",
        "attn_implementation": "evil/evil",
        "custom_pipelines": {"text": {"impl": "evil.Evil"}},
        "trust_remote_code": True,
    }
    assert read({**values, **code}) == read(values)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM"),
        ({"compression_config": {"format": "dense"}}, "compression_config"),
        ({"hidden_act": "xielu"}, "xielu.*silu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic.*llama3"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "mrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ],
)
def test_what_is_not_served_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=named):
        read({**tiny("LlamaForCausalLM"), **change})


@pytest.mark.parametrize(
    ("architecture", "change", "named"),
    [
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional"),
        ("MistralForCausalLM", {"attention_bias": True}, "attention_bias"),
        ("MistralForCausalLM", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        (
            "BloomForCausalLM",
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm",
        ),
    ],
)
def test_what_a_family_does_not_serve_is_refused_by_name(
    architecture: str, change: dict[str, object], named: str
) -> None:
    with pytest.raises(UnsupportedArchitecture, match=named):
        read({**tiny(architecture), **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": None}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"hidden_size": 33, "head_dim": None}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"head_dim": 7}, "rotated dimensions"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta"),
        ({"rope_parameters": []}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_a_malformed_config_is_named_by_file_and_key(change: dict[str, object], named: str) -> None:
    with pytest.raises(ModelFormatError, match=named) as caught:
        read({**tiny("LlamaForCausalLM"), **change})
    assert str(caught.value).startswith("config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_missing_key_is_named(key: str) -> None:
    values = tiny("LlamaForCausalLM")
    del values[key]
    with pytest.raises(ModelFormatError, match=f"{key} is missing"):
        read(values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("long_factor", [1.0, 2.0]),
        ("long_factor", [1.0, 2.0, 3.0, 0.0]),
        ("short_factor", None),
        ("partial_rotary_factor", 1.5),
        ("partial_rotary_factor", 0.01),
    ],
)
def test_a_malformed_longrope_is_refused(key: str, value: object) -> None:
    values = tiny("Phi3ForCausalLM")
    values["rope_parameters"][key] = value
    with pytest.raises(ModelFormatError):
        read(values)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a":' * 100_000, b" " * (MAX_BYTES + 1)]
)
def test_a_file_that_is_no_config_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        load_config(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        load_config(tmp_path / "config.json")


def paths(values: Mapping[str, object], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from paths(value, (*before, key))


VALID = {name: tiny(name) for name in FAMILIES}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 200)
    | st.integers()
    | st.floats()
    | st.sampled_from(["linear", "yarn", "llama3", "longrope", "silu", ""]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_mutated_config_is_read_or_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(VALID)))
    values = json.loads(json.dumps(VALID[name]))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, key = data.draw(st.sampled_from(sorted(paths(values))))
        holder: Any = values
        for parent in parents:
            holder = holder[parent]
        holder[key] = data.draw(JSON)
    try:
        config = read(values)
    except (ModelFormatError, UnsupportedArchitecture):
        return
    assert model_spec(config, dtype="float32").weight_bytes > 0
