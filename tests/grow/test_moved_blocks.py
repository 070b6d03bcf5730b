"""Room to grow: what one backend computed goes on another that cuts texts into blocks of another size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from chipset.backends.conformance.rows import padded
from chipset.backends.kv_cache import KVBlob
from chipset.core.files import ModelFiles
from chipset.core.request import Request

from .driver import Driver, capabilities_of, driving

PROMPT = list(range(3, 210, 3))
COUNT = 8


def exported(driver: Driver, blocks: Sequence[int]) -> KVBlob:
    """The tokens of these blocks, and of those that pad their number."""
    runner = driver.runner
    with torch.inference_mode():
        return runner.backend.kv.export_blocks(runner._cache, 0, padded(blocks)).result()


def imported(driver: Driver, blocks: Sequence[int], blob: KVBlob) -> None:
    """The first tokens of the blob, as many as the blocks hold."""
    runner, ids = driver.runner, padded(blocks)
    more = ids.size * driver.kv.block_size - blob.keys.shape[1]
    keys, values = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (blob.keys, blob.values))
    whole = replace(blob, keys=keys, values=values)
    with torch.inference_mode():
        runner._cache = runner.backend.kv.import_blocks(runner._cache, 0, ids, whole)


def once_per_size(driver: Driver) -> None:
    """As the contract asks of whoever moves blocks."""
    for size in (1, 2, 4, 8):
        imported(driver, [0] * size, exported(driver, [0] * size))


def move(giver: Driver, request: Request, taker: Driver) -> Request:
    """The same text elsewhere: whole blocks of the taker's are moved, what is left over is computed again."""
    moved = taker.open(request.tokens)
    assert request.table is not None
    assert moved.table is not None
    count = request.num_computed // taker.kv.block_size
    assert count, "the text fills no block"
    taker.kv.reserve(moved.table, len(moved.tokens))
    imported(taker, moved.table.blocks[0][:count], exported(giver, request.table.blocks[0]))
    moved.advance(count * taker.kv.block_size)
    return moved


@pytest.mark.parametrize("gives", [True, False], ids=["to cpu", "from cpu"])
def test_a_text_goes_on_where_its_blocks_were_moved(
    backend: str, model: ModelFiles, gives: bool
) -> None:
    claimed = capabilities_of(backend)
    if not claimed.prefix_cache:
        pytest.skip(f"{backend} starts no text from blocks that it did not compute")
    with driving("cpu", model) as driver:
        (whole,) = driver.generate([driver.open(PROMPT)], 3 * COUNT)
    size = min(claimed.block_sizes)
    with (
        driving(backend, model, before_freeze=once_per_size, block_size=size) as one,
        driving(
            "cpu", model, before_freeze=once_per_size, block_size=32 if size == 16 else 16
        ) as other,
    ):
        giver, taker = (one, other) if gives else (other, one)
        assert giver.kv.block_size != taker.kv.block_size
        request = giver.open(PROMPT)
        start = giver.generate([request], COUNT)[0]
        moved = move(giver, request, taker)
        assert moved.num_computed >= 64
        assert start + taker.generate([moved], 2 * COUNT)[0] == whole
