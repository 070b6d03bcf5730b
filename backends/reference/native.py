"""Libraries that the system's compiler builds from a plugin's own C or C++: once for each source, compiler and flags.

    $CHIPSET_CACHE or ~/.cache/chipset    /build/HASH/NAME.so

A library appears whole or not at all: any number of processes may build it at once, and the last one to finish wins.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import BackendUnavailable

_BUILD_TIMEOUT_S = 600


def cache_folder() -> Path:
    """Where what was built and downloaded is kept."""
    named = os.environ.get("CHIPSET_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "chipset"


@dataclass(frozen=True, kw_only=True, slots=True)
class NativeLibrary:
    """What to build, and with what."""

    name: str
    """Of the file, without .so."""
    what: str
    """In a few words, for errors."""
    sources: tuple[Path, ...]
    """The first is compiled; the others are those that it includes."""
    compiler: str
    """A command on PATH, or a path."""
    package: str
    """That brings the compiler on Debian."""
    flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()
    built_for: tuple[str, ...] = ()
    """What else must be the same for the library to be taken again, such as a version."""

    def path(self) -> Path:
        """Where it lies once built: of the same name only if everything that goes into it is the same."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(source.read_bytes())
        for word in (*self.built_for, self.compiler, *self.flags, *self.libraries):
            digest.update(b"\0" + word.encode())
        return cache_folder() / "build" / digest.hexdigest()[:20] / f"{self.name}.so"

    def build(self) -> Path:
        """Compile unless it is there already; raises BackendUnavailable without a compiler that can."""
        path = self.path()
        if path.exists():
            return path
        compiler = shutil.which(self.compiler)
        if compiler is None:
            raise BackendUnavailable(
                f"{self.what} needs the compiler {self.compiler}, which is not on PATH; "
                f"install it (Debian: apt-get install {self.package})"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = Path(folder) / path.name
                self._compile(compiler, made)
                made.replace(path)
        except OSError as error:
            raise BackendUnavailable(
                f"{self.what} cannot be built in {cache_folder()}: {error}; set CHIPSET_CACHE to a folder to write to"
            ) from error
        return path

    def _compile(self, compiler: str, made: Path) -> None:
        libraries = [f"-l{name}" for name in self.libraries]
        done = subprocess.run(
            [compiler, *self.flags, str(self.sources[0]), "-o", str(made), *libraries],
            capture_output=True,
            text=True,
            check=False,
            timeout=_BUILD_TIMEOUT_S,
        )
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            first = (errors or done.stderr.splitlines() or ["no message"])[0]
            versions = f" for {', '.join(self.built_for)}" if self.built_for else ""
            raise BackendUnavailable(
                f"{compiler} could not build {self.what}{versions}: {first}; it was seen working with GCC 12"
            )
