"""A model of one layer in every format, loaded as for serving, beside Transformers with what its weights are worth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forced_logits import ForcedModel
from quantised_models import (
    Format,
    PlainModel,
    formats,
    small_model,
    transformers_logits,
    transformers_model,
)

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
def model() -> PlainModel:
    return small_model(num_hidden_layers=1)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_logits_are_those_of_the_weights_that_were_meant(
    form: Format, model: PlainModel, tmp_path: Path
) -> None:
    quantised = form.write(model, tmp_path)
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
