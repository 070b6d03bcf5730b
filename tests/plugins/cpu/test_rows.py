from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chipset.plugins.cpu.rows import split_evenly


@given(
    st.lists(st.integers(1, 3000), max_size=40).map(lambda keys: np.array(keys, np.int32)),
    st.integers(1, 5000),
)
def test_rows_are_split_into_sets_of_little_padding(num_keys: np.ndarray, most: int) -> None:
    rows = np.arange(len(num_keys)) * 3
    sets = list(split_evenly(rows, num_keys, most))
    assert sorted(row for one in sets for row in one) == rows.tolist()
    for one in sets:
        keys = num_keys[one // 3]
        assert 2 * keys.min() >= keys.max()
        assert len(one) == 1 or len(one) * keys.max() <= most
        assert (np.diff(one) > 0).all()


def test_rows_of_like_length_stay_together_and_in_order() -> None:
    rows, keys = np.array([0, 1, 2, 3]), np.array([300, 290, 310, 200], np.int32)
    assert [one.tolist() for one in split_evenly(rows, keys, 10_000)] == [[0, 1, 2, 3]]
    assert [one.tolist() for one in split_evenly(rows, keys, 700)] == [[0, 2], [1, 3]]
