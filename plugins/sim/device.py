"""The emulated device `sim`: the module torch.sim once `load` has run.

Tensors on it are real device tensors to torch, in memory that the host cannot read: whoever reads without a permit gets
torch.AcceleratorError and is counted (see .watch). It runs everything at once and on the CPU, so results are the CPU's
bit for bit, and nothing is ever late.

    load()
    t = torch.zeros(3, device="sim")
"""

from __future__ import annotations

import sys

import torch
from torch.utils import backend_registration

from ...backends.errors import BackendUnavailable
from . import watch as watch
from .library import Library
from .plugin import NUM_DEVICES

NAME = "sim"
DEFAULT_TOTAL_BYTES = 8 << 30
"""Of each device."""


def load(num_devices: int | None = None) -> None:
    """Build the library where the cache has none, and register the device with torch; later calls are free.

    The first call sets how many devices there are, NUM_DEVICES unless told. Raises BackendUnavailable without a
    compiler, where another extension has torch's place for foreign devices, or where a later call asks for another
    number.
    """
    if not is_loaded():
        _register(num_devices or NUM_DEVICES)
    if num_devices not in (None, device_count()):
        raise BackendUnavailable(
            f"the emulated device was loaded with {device_count()} devices, not {num_devices}; "
            "ask for all that the process will need in the first call"
        )


def is_loaded() -> bool:
    """Whether `load` has run in this process."""
    return getattr(torch, NAME, None) is sys.modules[__name__]


def is_available() -> bool:
    """Always."""
    return True


def is_initialized() -> bool:
    """Always."""
    return True


def device_count() -> int:
    """As `load` was told."""
    count: int = torch.ops.chipset_device.device_count()
    return count


def current_device() -> int:
    """Of this thread."""
    index: int = torch.ops.chipset_device.current_device()
    return index


def set_device(device: int | str | torch.device) -> None:
    """Of this thread. Raises IndexError where there is no such device."""
    torch.ops.chipset_device.set_device(_index(device))


def synchronize(device: int | str | torch.device | None = None) -> None:  # noqa: ARG001 - torch passes it
    """Counted; there is never anything to wait for."""
    torch.ops.chipset_device.synchronize()


def mem_get_info(device: int | str | torch.device | None = None) -> tuple[int, int]:
    """Bytes free and in all."""
    allocated, _, total = _memory(device)
    return max(0, total - allocated), total


def memory_allocated(device: int | str | torch.device | None = None) -> int:
    """Bytes that tensors hold."""
    return _memory(device)[0]


def max_memory_allocated(device: int | str | torch.device | None = None) -> int:
    """The most bytes that tensors held since the start or the last reset_peak_memory_stats."""
    return _memory(device)[1]


def reset_peak_memory_stats(device: int | str | torch.device | None = None) -> None:
    """The peak becomes what is held now."""
    torch.ops.chipset_device.reset_peak(_index(device))


def set_total_memory(num_bytes: int = DEFAULT_TOTAL_BYTES) -> None:
    """Of each device; above it an allocation raises torch.OutOfMemoryError."""
    torch.ops.chipset_device.set_total(num_bytes)


def manual_seed_all(seed: int) -> None:
    """Random numbers are the CPU's, which torch.manual_seed seeds itself."""


def get_amp_supported_dtype() -> list[torch.dtype]:
    """What torch.autocast asks for."""
    return [torch.float16, torch.bfloat16]


def _register(num_devices: int) -> None:
    path = Library().build()
    try:
        backend_registration.rename_privateuse1_backend(NAME)
    except RuntimeError as error:
        raise BackendUnavailable(
            f"torch has one place for foreign devices and it is taken: {error}; do not load both in one process"
        ) from error
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    torch.ops.chipset_device.set_device_count(num_devices)
    torch._register_device_module(NAME, sys.modules[__name__])  # type: ignore[no-untyped-call]


def _is_in_bad_fork() -> bool:
    return False


def _lazy_init() -> None:
    """Nothing is left to do after load."""


def _memory(device: int | str | torch.device | None) -> tuple[int, int, int]:
    found: tuple[int, int, int] = torch.ops.chipset_device.memory(_index(device))
    return found


def _index(device: int | str | torch.device | None) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index
