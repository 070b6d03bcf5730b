"""Tiny checkpoints, and every backend that runs here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from chipset.core.conformance.checkpoint import FULL, WINDOWED, make_checkpoint
from chipset.core.files import ModelFiles

from .driver import BACKENDS


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_checkpoint(FULL, tmp_path_factory.mktemp("full"), seed=1)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_checkpoint(FULL, tmp_path_factory.mktemp("other"), seed=2)


@pytest.fixture(scope="session")
def windowed_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_checkpoint(WINDOWED, tmp_path_factory.mktemp("windowed"), seed=3)
