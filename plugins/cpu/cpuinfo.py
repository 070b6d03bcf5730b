"""What kind of CPU this is, by the flags that the kernel reports."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_ARCHITECTURES = (
    ("amx_bf16", "amx_bf16"),
    ("avx512_bf16", "avx512_bf16"),
    ("avx512f", "avx512"),
    ("avx2", "avx2"),
    ("avx", "avx"),
    ("bf16", "arm_bf16"),
    ("sve", "sve"),
    ("asimd", "neon"),
)
"""(flag, name of what has it), best first."""
_NATIVE_BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16", "arm_bf16"})


def architecture(cpuinfo: Path = CPUINFO) -> str:
    """The best vector extension, as Probe.architecture; the machine's name where the kernel reports no flags."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = frozenset(value.split())
            return next((n for flag, n in _ARCHITECTURES if flag in flags), platform.machine())
    return platform.machine()


def multiplies_bfloat16(architecture: str) -> bool:
    """Whether it has instructions that multiply bfloat16; others widen to float32, number by number."""
    return architecture in _NATIVE_BFLOAT16
