"""One pool of blocks."""

import pytest

from chipset.core.kv_cache.blocks import BlockPool


def test_blank_blocks_are_handed_out_lowest_id_first():
    pool = BlockPool(8)
    assert pool.take(3) == [1, 2, 3]
    pool.release([2])
    assert pool.take(2) == [2, 4]


def test_block_zero_belongs_to_nobody():
    pool = BlockPool(4)
    assert sorted(pool.take(3)) == [1, 2, 3]
    assert pool.num_free == 0


def test_cached_blocks_are_evicted_longest_unused_first_and_after_all_blank_ones():
    pool = BlockPool(5)
    a, b, c = pool.take(3)
    for block, key in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.remember(block, key)
    pool.release([b, a, c])
    assert pool.take(2) == [4, b]
    assert pool.find(b"b") is None
    assert pool.find(b"a") == a


def test_a_cached_block_that_is_found_again_is_not_evicted():
    pool = BlockPool(3)
    a, b = pool.take(2)
    pool.remember(a, b"a")
    pool.remember(b, b"b")
    pool.release([a, b])
    pool.acquire([a])
    assert pool.take(1) == [b]
    pool.check([a, b])


def test_a_shared_block_is_free_only_when_the_last_holder_leaves():
    pool = BlockPool(3)
    (a,) = pool.take(1)
    pool.remember(a, b"a")
    pool.acquire([a])
    pool.release([a])
    assert pool.num_held == 1
    pool.release([a])
    assert pool.num_held == 0


def test_releasing_what_nobody_holds_is_a_bug_that_is_noticed():
    pool = BlockPool(3)
    (a,) = pool.take(1)
    pool.release([a])
    with pytest.raises(AssertionError):
        pool.release([a])


def test_the_same_content_is_recorded_once():
    pool = BlockPool(4)
    a, b = pool.take(2)
    pool.remember(a, b"x")
    pool.remember(b, b"x")
    pool.release([a, b])
    pool.check([])
    assert pool.find(b"x") == a


def test_check_notices_a_lost_block():
    pool = BlockPool(4)
    pool.take(2)
    with pytest.raises(AssertionError):
        pool.check([1])
