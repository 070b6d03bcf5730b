"""Bytes to blocks."""

from fakes import kv_group
from hypothesis import given
from hypothesis import strategies as st

from chipset.core.kv_cache.sizing import size_groups

SIZES = {"block_size": 16, "max_rows": 4, "max_step_tokens": 64, "max_context": 1024}


def test_one_group_gets_all_the_bytes_but_the_null_block():
    size = size_groups([kv_group()], [100], 1050, **SIZES)
    assert size.num_blocks == (10,)
    assert size.num_tokens == 9 * 16
    assert size.num_bytes == 1000


def test_no_more_is_taken_than_all_rows_need():
    size = size_groups([kv_group()], [100], 10**9, **SIZES)
    assert size.num_tokens == 4 * 1024


def test_a_sliding_group_stops_at_its_windows():
    size = size_groups([kv_group(), kv_group(32, (1,))], [100, 100], 10**9, **SIZES)
    assert size.num_blocks == (257, 4 * 7 + 1)


@given(
    budget=st.integers(0, 10**6),
    windows=st.lists(st.sampled_from([None, 5, 100]), min_size=1, max_size=3),
    cost=st.integers(1, 1000),
)
def test_the_budget_is_kept_and_nearly_used(budget, windows, cost):
    groups = [kv_group(window, (i,)) for i, window in enumerate(windows)]
    size = size_groups(groups, [cost] * len(groups), budget, **SIZES)
    assert size.num_bytes <= max(budget, cost * len(groups))
    if size.num_tokens < 4 * 1024:
        assert size.num_bytes + cost * len(groups) > budget or size.num_tokens == 0
