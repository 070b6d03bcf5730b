"""The host as the device, with memory as control groups see it."""

from __future__ import annotations

import resource

from ...backends.reference.runtime import HostRuntime
from ...backends.runtime import MemoryInfo
from .memory import available_bytes, total_bytes


class CPURuntime(HostRuntime):
    """Torch's CPU device."""

    def memory(self) -> MemoryInfo | None:
        """free: what this process may still take; peak: the most it ever held."""
        return MemoryInfo(
            free=available_bytes(),
            total=total_bytes(),
            peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            exact=False,
        )
