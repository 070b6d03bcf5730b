"""The default model, Transformers' view of it, and a real server."""

import warnings
from pathlib import Path

import pytest
import torch
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
def server(tmp_path_factory):
    """A float32 server of the default model."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with served(log, "--dtype", "float32", "--kv-cache-memory", "256MiB") as running:
        yield running
