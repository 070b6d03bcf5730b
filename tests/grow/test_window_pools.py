"""Room to grow: a sliding-window group beside a full one, each with as many blocks as it needs."""

from __future__ import annotations

import pytest

from chipset.core.conformance.checkpoint import WINDOWED
from chipset.core.files import ModelFiles
from chipset.core.kv_cache.manager import window_blocks

from .driver import capabilities_of, driving

PROMPTS = (list(range(30, 90)), list(range(7, 300, 5)))
COUNT = 66
WINDOW = 40


def test_a_window_takes_few_blocks_beside_a_full_cache(
    backend: str, windowed_model: ModelFiles
) -> None:
    assert WINDOWED["sliding_window"] == WINDOW
    claimed = capabilities_of(backend)
    if "window" not in claimed.attention:
        pytest.skip(f"{backend} does not claim windows")
    alone = []
    for prompt in PROMPTS:
        with driving("cpu", windowed_model, (24, 24)) as driver:
            alone += driver.generate([driver.open(prompt)], COUNT)
    size = min(claimed.block_sizes)
    window, full = window_blocks(WINDOW, 1, size), -(-(len(PROMPTS[0]) + COUNT) // size)
    pools = (1 + len(PROMPTS) * window, 1 + len(PROMPTS) * full)
    with driving(backend, windowed_model, pools, block_size=size) as driver:
        groups = driver.runner.launch.model.groups
        assert [group.window for group in groups] == [WINDOW, None]
        assert driver.generate([driver.open(prompt) for prompt in PROMPTS], COUNT) == alone
        assert driver.kv.pools[1].num_free == 0, "the full group needed all of its blocks"
