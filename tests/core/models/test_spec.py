from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from chipset.core.models.spec import layer_attention, model_spec

from .cases import CASES, Case
from .harness import Checkpoint

BY_NAME = {case.name: case for case in CASES}
Make = Callable[[Case], Checkpoint]


def test_layers_with_equal_windows_share_a_group(checkpoint_of: Make) -> None:
    config = checkpoint_of(BY_NAME["gemma-3"]).config
    spec = model_spec(config, dtype="float32")
    assert [(g.kind, g.window, g.layers) for g in spec.groups] == [
        ("sliding", 13, (0, 2)),
        ("full", None, (1,)),
    ]
    assert [a.group for a in layer_attention(spec)] == [0, 1, 0]
    assert [a.window for a in layer_attention(spec)] == [13, None, 13]


def test_every_layer_is_in_one_group(checkpoint: Checkpoint) -> None:
    spec = model_spec(checkpoint.config, dtype="float32")
    layers = sorted(layer for group in spec.groups for layer in group.layers)
    assert layers == list(range(checkpoint.config.num_layers))
    assert [a.group for a in spec.attention] == list(range(len(spec.groups)))
    assert len(set(spec.attention)) == len(spec.attention)


@pytest.mark.parametrize(("max_context", "kinds"), [(13, {"full"}), (14, {"full", "sliding"})])
def test_a_window_as_long_as_the_context_is_none(
    max_context: int, kinds: set[str], checkpoint_of: Make
) -> None:
    config = checkpoint_of(BY_NAME["gemma-2"]).config
    spec = model_spec(config, dtype="float32", max_context=max_context)
    assert {group.kind for group in spec.groups} == kinds
    assert all((g.kind == "sliding") == (g.window is not None) for g in spec.groups)


def test_dtypes_of_weights_and_cache_are_told_apart(checkpoint_of: Make) -> None:
    config = checkpoint_of(BY_NAME["llama"]).config
    wide = model_spec(config, dtype="float32", kv_dtype="bfloat16")
    narrow = model_spec(config, dtype="bfloat16")
    assert (wide.dtype, wide.groups[0].dtype) == ("float32", "bfloat16")
    assert (narrow.dtype, narrow.groups[0].dtype) == ("bfloat16", "bfloat16")
    assert wide.weight_bytes == 2 * narrow.weight_bytes


def test_weight_bytes_are_those_of_the_checkpoint(checkpoint: Checkpoint) -> None:
    held = sum(tensor.numel() for _, tensor in checkpoint.weights())
    assert model_spec(checkpoint.config, dtype="float32").weight_bytes == 4 * held


def test_the_context_defaults_to_what_the_model_is_made_for(checkpoint: Checkpoint) -> None:
    config = replace(checkpoint.config, max_positions=77)
    assert model_spec(config, dtype="float32").max_context == 77


def test_config_and_spec_import_no_torch() -> None:
    code = "import sys, chipset.core.models.spec, chipset.core.models.families; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
