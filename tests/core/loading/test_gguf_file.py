from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipset.core.errors import ModelFormatError, ModelNotFound, UnsupportedArchitecture
from chipset.core.loading.gguf_convert import convert_gguf
from chipset.core.loading.gguf_file import read_gguf

from .ggufs import HIDDEN, TOKENS, tiny_llama


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_llama(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


def test_finds_keys_and_tensors_where_they_are(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model.gguf")
    file = read_gguf(path)
    assert file.text("general.architecture") == "llama"
    assert file.integer("llama.context_length") == 128
    assert file.number("llama.rope.freq_base") == 10000.0
    assert file.strings("tokenizer.ggml.tokens") == TOKENS
    norm = file.tensors["output_norm.weight"]
    assert norm.shape == (HIDDEN,)
    assert norm.num_bytes == 4 * HIDDEN
    assert file.tensors["token_embd.weight"].shape == (len(TOKENS), HIDDEN)
    data = path.read_bytes()
    first = struct.unpack_from("<f", data, norm.offset)[0]
    assert norm.offset % 32 == 0
    assert abs(first) < 10


def test_asks_for_keys_by_type(tmp_path: Path) -> None:
    file = read_gguf(tiny_llama(tmp_path / "model.gguf"))
    with pytest.raises(ModelFormatError, match=r"general\.architecture is of type str"):
        file.integer("general.architecture")
    with pytest.raises(ModelFormatError, match=r"llama\.nothing is absent"):
        file.number("llama.nothing")


def test_names_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="cannot be read"):
        read_gguf(tmp_path / "no.gguf")


def _patched(data: bytes, needle: bytes, replacement: bytes) -> bytes:
    """The bytes right behind the needle replaced."""
    at = data.index(needle) + len(needle)
    return data[:at] + replacement + data[at + len(replacement) :]


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


@pytest.mark.parametrize(
    ("replacements", "reason"),
    [
        ([(0, b"GGML")], "no GGUF file"),
        ([(4, _u32(1))], "version 1"),
        ([(4, struct.pack(">I", 3))], "big-endian"),
        ([(8, _u64(1 << 60))], "claims 1152921504606846976 tensors"),
        ([(16, _u64(1 << 40))], "claims 1099511627776 keys"),
        ([(24, _u64(1 << 63))], "a string claims"),
    ],
)
def test_refuses_a_broken_head(
    tmp_path: Path, original: bytes, replacements: list[tuple[int, bytes]], reason: str
) -> None:
    data = bytearray(original)
    for at, new in replacements:
        data[at : at + len(new)] = new
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match=reason):
        read_gguf(path)


NAME = b"token_embd.weight"


@pytest.mark.parametrize(
    ("behind_the_name", "reason"),
    [
        (_u32(0), "has 0 dimensions"),
        (_u32(1 << 31), "has 2147483648 dimensions"),
        (_u32(2) + _u64(0), "cannot have the shape"),
        (_u32(2) + _u64(1 << 63) + _u64(1 << 63), "larger than the file"),
        (_u32(2) + _u64(HIDDEN) + _u64(len(TOKENS)) + _u32(999), "unknown type 999"),
        (_u32(2) + _u64(HIDDEN + 1) + _u64(len(TOKENS)) + _u32(2), "Q4_0 cannot have the shape"),
        (_u32(2) + _u64(HIDDEN) + _u64(len(TOKENS)) + _u32(0) + _u64(8), "not aligned"),
        (_u32(2) + _u64(HIDDEN) + _u64(len(TOKENS)) + _u32(0) + _u64(1 << 40), "cut off"),
        (_u32(2) + _u64(HIDDEN) + _u64(2 * len(TOKENS)) + _u32(0), "overlaps another"),
    ],
)
def test_refuses_a_broken_tensor(
    tmp_path: Path, original: bytes, behind_the_name: bytes, reason: str
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(_patched(original, NAME, behind_the_name))
    with pytest.raises(ModelFormatError, match=reason):
        read_gguf(path)


def test_says_that_a_file_is_cut_off(tmp_path: Path, original: bytes) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(original[:-1])
    with pytest.raises(ModelFormatError, match=r"cut off.*download it again"):
        read_gguf(path)


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes of the head changed, overwritten by extreme numbers, cut out or doubled."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(4500)
        match rng.randrange(5):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                extreme = rng.choice([0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1])
                changed[at : at + 8] = _u64(extreme)
            case 2:
                del changed[at : at + rng.randint(1, 64)]
            case 3:
                changed[at:at] = changed[at : at + rng.randint(1, 64)]
            case _:
                del changed[rng.randrange(len(changed)) :]
                changed += bytes(max(0, 4600 - len(changed)))
    return bytes(changed)


def test_any_mutation_ends_in_one_typed_error_or_a_model(tmp_path: Path, original: bytes) -> None:
    rng = random.Random(0)
    errors = []
    path = tmp_path / "mutant.gguf"
    tracemalloc.start()
    try:
        for _ in range(400):
            path.write_bytes(_mutated(original, rng))
            try:
                convert_gguf(path)
            except (ModelFormatError, UnsupportedArchitecture) as error:
                errors.append(str(error))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(errors) > 200
    assert not any("\n" in error for error in errors)
    assert peak < 4_000_000


@given(data=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_behind_the_magic_end_in_one_typed_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(b"GGUF" + _u32(3) + data)
    with contextlib.suppress(ModelFormatError):
        assert len(read_gguf(path).metadata) <= len(data)
