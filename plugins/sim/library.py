"""The emulated device's C++ library: built once for each source, torch and compiler, then found in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...backends.reference.native import NativeLibrary

SOURCES = ("device.cpp", "device_rules.h", "device_memory.h")
LIBRARIES = ("torch", "torch_cpu", "c10")


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
        """See NativeLibrary.path."""
        return self._native().path()

    def build(self) -> Path:
        """Compile unless it is there already (15 s); raises BackendUnavailable without a compiler that can."""
        return self._native().build()

    def _native(self) -> NativeLibrary:
        return NativeLibrary(
            name="device",
            what="the emulated device",
            sources=tuple(Path(__file__).parent / name for name in SOURCES),
            compiler=self.compiler,
            package="g++",
            flags=self.flags,
            libraries=LIBRARIES,
            built_for=(f"torch {torch.__version__}",),
        )
