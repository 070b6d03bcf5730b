"""A model of one layer in every format, loaded as for serving, beside Transformers with what its weights are worth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forced_logits import ForcedModel
from quantised_models import (
    SMALL,
    Format,
    PlainModel,
    formats,
    small_model,
    transformers_logits,
    transformers_model,
)
from transformers import LlamaConfig, MixtralConfig

from chipset.core.loading.weights import open_weights
from chipset.core.models.families import load_config
from chipset.core.worker import scheme_of

IDS = [(7 * number * number + 3) % 512 for number in range(48)]
FORMATS = formats(128, dict)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dense() -> PlainModel:
    return small_model(LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))


@pytest.fixture(scope="module")
def mixture() -> PlainModel:
    sizes = {"num_local_experts": 4, "intermediate_size": 128, "num_hidden_layers": 1}
    return small_model(MixtralConfig(**{**SMALL, **sizes}))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_dense_model_computes_with_the_weights_that_were_meant(
    form: Format, dense: PlainModel, tmp_path: Path
) -> None:
    assert_worth(form, dense, tmp_path)


@pytest.mark.parametrize(
    "form", [form for form in FORMATS if "GGUF" not in form.name], ids=lambda form: form.name
)
def test_experts_compute_with_the_weights_that_were_meant(
    form: Format, mixture: PlainModel, tmp_path: Path
) -> None:
    assert_worth(form, mixture, tmp_path)


def assert_worth(form: Format, model: PlainModel, folder: Path) -> None:
    quantised = form.write(model, folder)
    files = quantised.files
    ours = ForcedModel(
        load_config(files.config),
        open_weights(files),
        scheme_of(files, quantised.quantize, ()),
        window=len(IDS),
    )
    theirs = transformers_logits(transformers_model(model.config, quantised.values), IDS)
    plain = transformers_logits(transformers_model(model.config, model.tensors), IDS)
    error = (ours.logits(IDS) - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-4
    if form.name != "plain":
        assert (plain - theirs).abs().max() / theirs.abs().max() > 10 * error, "nothing was rounded"
        assert any(not kernel.startswith("plain") for kernel in ours.report.kernels)
    ours.close()
