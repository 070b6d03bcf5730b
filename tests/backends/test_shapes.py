"""Dynamic shapes."""

from dataclasses import replace

import pytest

from chipset.backends.errors import TooLarge
from chipset.backends.shapes import BatchPolicy, BatchShape, DynamicShapes, Phase

SHAPE = BatchShape(
    phase=Phase.MIXED,
    num_rows=3,
    num_tokens=10,
    num_logits=0,
    max_query=8,
    max_context=33,
    max_computed=25,
    num_blocks=4,
    max_block=9,
)
SHAPES = DynamicShapes(BatchPolicy(max_rows=4, max_tokens=16, max_context=64), block_size=16)


def test_sizes_are_exact_but_for_one_row_of_logits():
    bucket = SHAPES.fit(SHAPE)
    assert (bucket.num_rows, bucket.num_tokens, bucket.max_query) == (3, 10, 8)
    assert bucket.num_logits == 1
    assert bucket.blocks_per_row == 3


@pytest.mark.parametrize(
    ("field", "value", "axis"),
    [("num_rows", 5, "rows"), ("num_tokens", 17, "tokens"), ("max_context", 65, "context")],
)
def test_what_the_policy_forbids_is_too_large_along_its_axis(field, value, axis):
    with pytest.raises(TooLarge) as caught:
        SHAPES.fit(replace(SHAPE, **{field: value}))
    assert caught.value.axis == axis
    assert caught.value.limit < value
