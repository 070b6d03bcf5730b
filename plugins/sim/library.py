"""The emulated device's C++ library: built once for each source, torch and compiler, then found in the cache.

    $CHIPSET_CACHE or ~/.cache/chipset    /build/HASH/device.so

It appears whole or not at all: any number of processes may build it at once, and the last one to finish wins.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ...backends.errors import BackendUnavailable

SOURCES = ("device.cpp", "device_rules.h", "device_memory.h")
LIBRARIES = ("torch", "torch_cpu", "c10")
_BUILD_TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """What to build, and with what. `key` is torch's dispatch key (and device type) that the device takes."""

    key: str = "PrivateUse1"
    compiler: str = "g++"

    @property
    def flags(self) -> tuple[str, ...]:
        """Of the compiler. Torch's headers count as the system's, so that their warnings stay away."""
        abi = int(torch.compiled_with_cxx11_abi())
        home = Path(torch.__file__).parent
        include, lib = home / "include", home / "lib"
        headers = (include, include / "torch" / "csrc" / "api" / "include")
        return (
            *("-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden"),
            *(f"-D_GLIBCXX_USE_CXX11_ABI={abi}", f"-DCHIPSET_DEVICE_KEY={self.key}"),
            *(f"-isystem{path}" for path in headers),
            *(f"-L{lib}", f"-Wl,-rpath,{lib}"),
        )

    def path(self) -> Path:
        """Where it lies once built: of the same name only if everything that goes into it is the same."""
        digest = hashlib.sha256()
        for name in SOURCES:
            digest.update((Path(__file__).parent / name).read_bytes())
        for word in (torch.__version__, self.compiler, *self.flags, *LIBRARIES):
            digest.update(b"\0" + word.encode())
        return _cache() / "build" / digest.hexdigest()[:20] / "device.so"

    def build(self) -> Path:
        """Compile unless it is there already (15 s); raises BackendUnavailable without a compiler that can."""
        path = self.path()
        if path.exists():
            return path
        compiler = shutil.which(self.compiler)
        if compiler is None:
            raise BackendUnavailable(
                f"the emulated device needs the compiler {self.compiler}, which is not on PATH; "
                "install it (Debian: apt-get install g++)"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            self._compile(compiler, made)
            made.replace(path)
        return path

    def _compile(self, compiler: str, made: Path) -> None:
        source = Path(__file__).parent / SOURCES[0]
        libraries = [f"-l{name}" for name in LIBRARIES]
        done = subprocess.run(
            [compiler, *self.flags, str(source), "-o", str(made), *libraries],
            capture_output=True,
            text=True,
            check=False,
            timeout=_BUILD_TIMEOUT_S,
        )
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            first = (errors or done.stderr.splitlines() or ["no message"])[0]
            raise BackendUnavailable(
                f"{compiler} could not build the emulated device for torch {torch.__version__}: {first}; "
                "it was seen working with GCC 12 and torch 2.13"
            )


def _cache() -> Path:
    named = os.environ.get("CHIPSET_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "chipset"
