"""Against the gguf package's own quantiser and dequantiser."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from chipset.core.quantization.canonical import dequantise
from chipset.core.quantization.ggml import BLOCK_BYTES, GgmlScheme

from .test_canonical import assert_canonical
from .test_formats import MODULE, assert_stored, weight

KINDS = sorted(BLOCK_BYTES)


def blocks(kind: str, rows: int = 16, columns: int = 128) -> NDArray[np.uint8]:
    """u8 [rows, columns / 32, bytes]"""
    raw = gguf.quantize(weight(rows, columns).numpy(), GGMLQuantizationType[kind])
    return raw.reshape(rows, columns // 32, -1)


def theirs(raw: NDArray[np.uint8], kind: str) -> torch.Tensor:
    found = gguf.dequantize(raw.reshape(len(raw), -1), GGMLQuantizationType[kind])
    return torch.from_numpy(found)


def assert_worth(kind: str, raw: NDArray[np.uint8]) -> None:
    tensors = {"weight": torch.from_numpy(raw)}
    scheme = GgmlScheme({MODULE: kind})
    stored = scheme.stored(MODULE, raw.shape[1] * 32, len(raw))
    assert stored is not None
    assert_stored(tensors, stored, len(raw), raw.shape[1] * 32)
    packed = scheme.pack(MODULE, tensors)
    assert_canonical(packed)
    found, wanted = dequantise(packed), theirs(raw, kind)
    if kind == "Q4_1":
        # scale * q + minimum is rounded otherwise than scale * (q + minimum / scale)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_worth_what_gguf_says(kind: str) -> None:
    assert_worth(kind, blocks(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_one_block_is_a_row(kind: str) -> None:
    assert_worth(kind, blocks(kind, columns=32))


@pytest.mark.parametrize("kind", KINDS)
def test_any_bits_are_worth_what_gguf_says(kind: str) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (8, 4, BLOCK_BYTES[kind]), np.uint8)
    # the scale, and the minimum, are halves; those that are not finite are another test's
    raw[..., 1] &= 0xBF
    if kind == "Q4_1":
        raw[..., 3] &= 0xBF
    assert_worth(kind, raw)


def test_a_flat_block_of_q4_1_is_its_minimum() -> None:
    raw = blocks("Q4_1", rows=8)
    raw[0, 0, :2] = 0
    raw[1, 0, :4] = 0
    found = dequantise(GgmlScheme({MODULE: "Q4_1"}).pack(MODULE, {"weight": torch.from_numpy(raw)}))
    assert torch.equal(found[:2, :32], theirs(raw, "Q4_1")[:2, :32])


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_that_is_not_finite_is_refused(kind: str) -> None:
    raw = blocks(kind)
    raw[3, 1, :2] = 0x00, 0x7C
    with pytest.raises(ValueError, match=r"^weight holds nan or infinity"):
        GgmlScheme({MODULE: kind}).pack(MODULE, {"weight": torch.from_numpy(raw)})


def test_blocks_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^weight has the shape \[16, 4, 18\].*20 bytes"):
        GgmlScheme({MODULE: "Q4_1"}).pack(MODULE, {"weight": torch.from_numpy(blocks("Q4_0"))})


@pytest.mark.parametrize("kinds", [{}, {MODULE: "Q6_K"}, {MODULE: "F16"}])
def test_other_types_are_plain(kinds: dict[str, str]) -> None:
    assert GgmlScheme(kinds).stored(MODULE, 128, 16) is None
