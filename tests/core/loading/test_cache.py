from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chipset.core.errors import ModelError, NotEnoughDisk
from chipset.core.loading.cache import Cache, guard_disk, require_disk
from chipset.core.loading.progress import silent


def test_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHIPSET_CACHE", str(tmp_path))
    assert Cache.default().root == tmp_path
    monkeypatch.delenv("CHIPSET_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert Cache.default().root == Path("/home/someone/.cache/chipset")


def test_a_file_appears_whole_or_not_at_all(cache: Cache) -> None:
    path = cache.wheels / "package" / "file"
    with pytest.raises(FileNotFoundError), cache.new_file(path) as new:
        new.write_bytes((path.parent / "no such file").read_bytes())
    assert list(path.parent.iterdir()) == []
    with cache.new_file(path) as new:
        new.write_text("whole")
    assert [item.name for item in path.parent.iterdir()] == ["file"]


def test_a_folder_that_is_there_stays(cache: Cache) -> None:
    folder = cache.converted / "abc"
    cache.write_folder(folder, {"a": "1", "b": "2"})
    cache.write_folder(folder, {"a": "other"})
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "1", "b": "2"}
    assert [item.name for item in cache.converted.iterdir()] == ["abc"]


def test_a_hash_is_read_once_until_the_file_changes(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    reports: list[int] = []

    def report(phase: str, done: int, total: int, unit: str) -> None:
        reports.append(done)

    first = cache.sha256(path, report)
    assert cache.sha256(path, report) == first
    assert reports == [3]
    time.sleep(0.02)
    path.write_bytes(b"two")
    assert cache.sha256(path, report) != first


def test_a_broken_record_is_made_anew(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = cache.sha256(path, silent)
    (record,) = (cache.root / "hashes").iterdir()
    record.write_text("{")
    assert cache.sha256(path, silent) == first


_HOLD = """
import sys, time
from pathlib import Path
from chipset.core.loading.cache import Cache
with Cache(Path(sys.argv[1])).lock("model"):
    print("held", flush=True)
    time.sleep(0.3)
"""


def test_a_lock_keeps_another_process_waiting(cache: Cache) -> None:
    command = [sys.executable, "-c", _HOLD, str(cache.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        before = time.monotonic()
        with cache.lock("model"):
            waited = time.monotonic() - before
    assert waited > 0.1


def test_a_full_disk_names_the_place_the_bytes_and_the_cure(tmp_path: Path) -> None:
    with (
        pytest.raises(NotEnoughDisk, match=r"full at .*/file; 7 bytes.*CHIPSET_CACHE"),
        guard_disk(tmp_path / "file", 7),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_too_small_a_disk_is_noticed_before_writing(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughDisk, match="needs 1152921504606846976 bytes"):
        require_disk(tmp_path, 1 << 60)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("no folder")
    with pytest.raises(ModelError, match="set CHIPSET_CACHE"):
        Cache(tmp_path / "occupied").write_folder(tmp_path / "occupied" / "x", {"a": "1"})
