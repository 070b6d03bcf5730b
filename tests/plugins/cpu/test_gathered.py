from __future__ import annotations

import pytest
import torch

from chipset.plugins.cpu.gathered import Gathered

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_dtype", FLOAT8)
@pytest.mark.parametrize("has_nan", [False, True])
def test_every_float8_is_widened_as_torch_does(
    kv_dtype: torch.dtype, dtype: torch.dtype, has_nan: bool
) -> None:
    pages = torch.arange(256, dtype=torch.uint8).view(kv_dtype).view(16, 4, 2, 2)
    if not has_nan:
        pages = torch.where(pages.float().isfinite(), pages, 1.0)
    slots = torch.arange(64).flip(0)
    found = Gathered().take(pages, None, slots, dtype)
    wanted = pages.float().view(64, 2, 2).flip(0).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found.nan_to_num(999.0), wanted.nan_to_num(999.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_times_the_scale_of_its_token_and_head(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pages = torch.randint(-127, 128, (5, 4, 3, 8), generator=generator, dtype=torch.int8)
    scales = torch.rand(5, 4, 3, generator=generator)
    slots = torch.tensor([19, 0, 7, 7])
    found = Gathered().take(pages, scales, slots, dtype)
    wanted = (pages.float() * scales[..., None]).view(20, 3, 8)[slots].to(dtype)
    assert torch.equal(found, wanted)


def test_wider_numbers_are_taken_as_they_are() -> None:
    pages = torch.randn(5, 4, 3, 8)
    slots = torch.tensor([3, 11])
    gathered = Gathered()
    found = gathered.take(pages, None, slots, torch.float32)
    assert torch.equal(found, pages.view(20, 3, 8)[slots])
    again = gathered.take(pages, None, slots.flip(0), torch.float32)
    assert again.data_ptr() == found.data_ptr()


def test_nan_of_other_slots_is_not_taken() -> None:
    pages = torch.full((2, 2, 1, 4), torch.nan).to(torch.float8_e4m3fn)
    pages[1, 0] = 3.0
    found = Gathered().take(pages, None, torch.tensor([2]), torch.float32)
    assert torch.equal(found, torch.full((1, 1, 4), 3.0))
