from collections.abc import Iterator

import pytest

from .fakes import FakeEngine, LiveServer, live_server


@pytest.fixture(scope="session")
def shared() -> Iterator[tuple[FakeEngine, LiveServer]]:
    engine = FakeEngine()
    with live_server(engine) as live:
        yield engine, live


@pytest.fixture
def engine(shared: tuple[FakeEngine, LiveServer]) -> FakeEngine:
    """What `server` serves, as good as new."""
    shared[0].reset()
    return shared[0]


@pytest.fixture
def server(shared: tuple[FakeEngine, LiveServer], engine: FakeEngine) -> LiveServer:
    return shared[1]
