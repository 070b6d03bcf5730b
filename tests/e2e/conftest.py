"""The default model, Transformers' view of it, and a real server."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from quantised_models import default_model, plain
from served import served

from chipset.core.loading.resolve import find_model
from chipset.core.text.tokenizer import Tokenizer


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def model_files():
    """The default model, downloaded once."""
    return find_model(None)


@pytest.fixture(scope="session")
def tokenizer(model_files):
    return Tokenizer.load(model_files)


@pytest.fixture(scope="session")
def reference(model_files):
    """Transformers' model of the same file, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformers' own
        from transformers import AutoModelForCausalLM

        (weights,) = model_files.weights
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent, gguf_file=weights.name, dtype=torch.float32
        )
    return model.eval()


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory, model_files):
    """The default model with plain weights: packed ones are slow in float32, which texts are compared in."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    folder.mkdir()
    plain().write(default_model(), folder)
    for path in (
        model_files.tokenizer,
        model_files.tokenizer_config,
        model_files.chat_template,
        model_files.generation_config,
    ):
        if path is not None:
            shutil.copy(path, folder)
    return str(folder)


@pytest.fixture(scope="session")
def server(tmp_path_factory, plain_folder):
    """A float32 server of the default model."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    flags = (plain_folder, "--dtype", "float32", "--kv-cache-memory", "256MiB")
    with served(log, *flags) as running:
        yield running
