from __future__ import annotations

import pytest
import torch

from chipset.plugins.cpu.gathered import Gathered
from chipset.plugins.cpu.rows import Part

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def part(*slots: int) -> Part:
    """One row of one query over those slots."""
    index = torch.arange(len(slots))[None]
    return Part(
        tokens=slice(0, 1),
        slots=torch.tensor(slots),
        query_index=index[:, -1:],
        key_index=index,
        bias=None,
        causal=False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_dtype", FLOAT8)
@pytest.mark.parametrize("has_nan", [False, True])
def test_every_float8_is_widened_as_torch_does(
    kv_dtype: torch.dtype, dtype: torch.dtype, has_nan: bool
) -> None:
    pages = torch.arange(256, dtype=torch.uint8).view(kv_dtype).view(64, 2, 2)
    if not has_nan:
        pages = torch.where(pages.float().isfinite(), pages, 1.0)
    found = Gathered().take(pages, None, part(*range(63, -1, -1)), dtype)
    wanted = pages.float().flip(0)[None].to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found.nan_to_num(999.0), wanted.nan_to_num(999.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_times_the_scale_of_its_token_and_head(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pages = torch.randint(-127, 128, (20, 3, 8), generator=generator, dtype=torch.int8)
    scales = torch.rand(20, 3, generator=generator)
    found = Gathered().take(pages, scales, part(19, 0, 7, 7), dtype)
    wanted = (pages.float() * scales[..., None])[None, [19, 0, 7, 7]].to(dtype)
    assert torch.equal(found, wanted)


def test_wider_numbers_are_taken_as_they_are() -> None:
    pages = torch.randn(20, 3, 8)
    gathered = Gathered()
    found = gathered.take(pages, None, part(3, 11), torch.float32)
    assert torch.equal(found, pages[None, [3, 11]])
    again = gathered.take(pages, None, part(11, 3), torch.float32)
    assert again.data_ptr() == found.data_ptr()


def test_nan_of_other_slots_is_not_taken() -> None:
    pages = torch.full((4, 1, 4), torch.nan).to(torch.float8_e4m3fn)
    pages[2] = 3.0
    found = Gathered().take(pages, None, part(2), torch.float32)
    assert torch.equal(found, torch.full((1, 1, 1, 4), 3.0))
