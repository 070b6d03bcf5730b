from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from .cases import CASES, Case
from .harness import Checkpoint, make_checkpoint


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def make(case: Case) -> Checkpoint:
        if case.name not in made:
            folder: Path = tmp_path_factory.mktemp(case.name)
            made[case.name] = make_checkpoint(case.architecture, case.settings, folder)
        return made[case.name]

    return make


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def checkpoint(case: Case, checkpoint_of: Callable[[Case], Checkpoint]) -> Checkpoint:
    return checkpoint_of(case)
