"""What the matrix says of every format on a backend is what becomes of a layer there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quantised_models import SMALL, Format, PlainModel, formats, small_model
from transformers import LlamaConfig

from chipset.backends.errors import Incompatible
from chipset.backends.matrix import Matrix
from chipset.backends.options import EngineOptions
from chipset.backends.registry import Registry
from chipset.core.conformance.engines import running
from chipset.core.quantization.names import UNBUILT
from chipset.core.quantization.select import choose_scheme

PLAIN = "plain"
FORMATS = [form for form in formats(128, dict) if form.name != PLAIN]
WAYS = {
    (backend, form): way
    for backend, row in Matrix.load().rows.items()
    for claims in row.quantization.values()
    for form, way in claims.items()
}
BACKENDS = sorted({backend for backend, _ in WAYS} & set(Registry.discover(environment={}).names))


def row_name(form: str) -> str:
    """The matrix has one row where several layouts of a format fare alike."""
    words = form.removeprefix("--quantize ").replace(",", "").split()
    match words[0].lower():
        case "gptq":
            return f"gptq {words[1]} bits"
        case "gguf":
            return f"gguf {words[1]}"
        case name:
            return name


@pytest.fixture(scope="module")
def model() -> PlainModel:
    return small_model(LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_layer_is_kept_packed_or_not_as_the_matrix_says(
    form: Format, backend: str, model: PlainModel, tmp_path: Path
) -> None:
    quantised = form.write(model, tmp_path)
    plugin = Registry.discover(environment={}).load(backend)
    options = EngineOptions(dtype="float32", max_context=256, max_batch_rows=2)
    with running(plugin, quantised.files, options, quantize=quantised.quantize) as engine:
        ready = engine.ready
    packed = sum(n for kernel, n in ready.kernels.items() if not kernel.startswith(PLAIN))
    seen = {"native": packed, "dequantised": sum(ready.dequantised.values())}
    way = WAYS[backend, row_name(form.name)]
    assert {name for name, count in seen.items() if count} == {way}, (
        ready.kernels,
        ready.dequantised,
    )


@pytest.mark.parametrize("name", UNBUILT)
def test_what_is_not_built_yet_is_refused_by_name_and_said_to_be(name: str, tmp_path: Path) -> None:
    assert {way for (_, form), way in WAYS.items() if form == name} == {"refused"}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(Incompatible, match=name):
        choose_scheme(config, name, ())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_matrix_says_what_becomes_of_every_format(backend: str) -> None:
    there = {form for of, form in WAYS if of == backend}
    assert there == {row_name(form.name) for form in FORMATS} | set(UNBUILT) | {"gguf others"}
