from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chipset.core.models.shard import WHOLE, Shard, whole

SIZES = st.integers(1, 24)


@given(total=st.integers(1, 5000), size=SIZES)
def test_an_axis_is_cut_into_equal_parts_without_gap_or_overlap(total: int, size: int) -> None:
    spans = [Shard(rank=rank, size=size).even(total) for rank in range(size)]
    assert len({span.size for span in spans}) == 1
    held = [entry for span in spans for entry in range(span.start, span.stop)]
    assert held == list(range(total))
    # gathered side by side, all padding is behind the last entry
    assert [span.start for span in spans] == [
        min(total, rank * spans[0].size) for rank in range(size)
    ]


@given(total=st.integers(1, 100_000), size=SIZES)
def test_alignment_costs_little(total: int, size: int) -> None:
    part = Shard(size=size).even(total).size
    assert part * size <= max(total * 33 / 32, total + size - 1)


def test_parts_are_aligned_where_they_can_be() -> None:
    assert Shard(size=2).even(1536).size == 768
    assert Shard(size=8).even(1536).size == 192
    assert Shard(size=4).even(49_155).size == 12_416  # 97 x 128 rather than 12,289
    assert Shard(size=2).even(49).size == 25


@given(num_kv_heads=st.integers(1, 16), group=st.integers(1, 9), size=SIZES)
def test_every_head_is_on_one_rank_beside_its_kv_head(
    num_kv_heads: int, group: int, size: int
) -> None:
    num_heads = num_kv_heads * group
    held: list[int] = []
    sizes = set()
    for rank in range(size):
        shard = Shard(rank=rank, size=size)
        heads, kv_heads = shard.heads(num_heads, num_kv_heads), shard.kv_heads(num_kv_heads)
        sizes.add((heads.size, kv_heads.size))
        assert heads.num_held <= heads.size
        assert kv_heads.num_held <= kv_heads.size
        assert heads.size % kv_heads.size == 0
        for place in range(heads.num_held):
            head = heads.start + place
            held.append(head)
            # as attention finds the KV head of a query head
            assert kv_heads.start + place // (heads.size // kv_heads.size) == head // group
            assert head // group < kv_heads.stop
    assert held == list(range(num_heads))
    assert len(sizes) == 1


def test_heads_go_by_groups_and_kv_heads_are_repeated() -> None:
    two = [Shard(rank=rank, size=2) for rank in range(2)]
    assert [shard.heads(9, 3).size for shard in two] == [6, 6]
    assert [shard.kv_heads(3).size for shard in two] == [2, 2]
    eight = [Shard(rank=rank, size=8) for rank in range(8)]
    assert [shard.kv_heads(3).start for shard in eight] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [shard.heads(9, 3).num_held for shard in eight] == [2, 1, 2, 1, 2, 1, 0, 0]


@given(total=st.integers(1, 1000), num_kv_heads=st.integers(1, 9), group=st.integers(1, 9))
def test_one_rank_holds_all_without_padding(total: int, num_kv_heads: int, group: int) -> None:
    assert WHOLE.even(total) == whole(total)
    assert WHOLE.kv_heads(num_kv_heads) == whole(num_kv_heads)
    assert WHOLE.heads(num_kv_heads * group, num_kv_heads) == whole(num_kv_heads * group)
