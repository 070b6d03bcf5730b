"""Memory that ranks of one host exchange tensors through: anonymous, so that nothing is left of it when they die."""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ...backends.errors import BackendUnavailable
from ...backends.reference.collectives import STEP_S, Meeting, PeerLost, ordered_sum
from ...backends.reference.native import NativeLibrary
from .options import MAX_RANKS

CAPACITY = 1 << 20
"""Bytes of a buffer, of which each rank has two: larger tensors go in pieces."""
SPINS = 2000
"""Looks at a peer's slot before the processor is given to others: some tens of microseconds."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Those that the library adds up; other sums are torch's."""
ENDS = ("", "was silent for too long", "called another member", "is gone")
"""What became of a rank, by what a call returns."""
TOKEN_BYTES = 32
SEGMENT_START = mmap.PAGESIZE
"""Of the file: before it lies the token that tells ranks that they opened the right one."""


class Group(ctypes.Structure):
    """As shared_memory.c declares it."""

    _fields_ = (
        ("segment", ctypes.c_void_p),
        ("capacity", ctypes.c_uint64),
        ("calls", ctypes.c_uint64),
        ("timeout_ns", ctypes.c_int64),
        ("rank", ctypes.c_int32),
        ("ranks", ctypes.c_int32),
        ("spins", ctypes.c_int32),
        ("culprit", ctypes.c_int32),
        ("processes", ctypes.c_int32 * MAX_RANKS),
    )


def native(compiler: str = "cc") -> NativeLibrary:
    """shared_memory.c"""
    return NativeLibrary(
        name="shared_memory",
        what="memory shared by ranks",
        sources=(Path(__file__).with_suffix(".c"),),
        compiler=compiler,
        package="gcc",
        flags=("-std=c11", "-O3", "-shared", "-fPIC"),
    )


class SharedMemory:
    """What one rank of a group holds of it. See `meet`."""

    def __init__(self, library: ctypes.CDLL, group: Group, memory: mmap.mmap) -> None:
        self._library = library
        self._group = group
        self._memory = memory  # mapped as long as this lives
        self._is_lost = False

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum in the order of the ranks, with the bits of ordered_sum, on each of them."""
        if x.dtype not in DTYPES:
            return ordered_sum(self.all_gather(x[None], 0))
        part = x.contiguous()
        total = torch.empty_like(part)
        pointers = part.data_ptr(), total.data_ptr()
        self._call(self._library.chipset_all_reduce, DTYPES[x.dtype], *pointers, x.numel())
        return total

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """The parts side by side along `dim`, in the order of the ranks."""
        part, shape, axis = x.contiguous(), [*x.shape], dim % x.dim()
        shape[axis] *= self._group.ranks
        whole = torch.empty(shape, dtype=x.dtype)
        num_rows = prod(shape[:axis])
        if part.nbytes:
            pointers = part.data_ptr(), whole.data_ptr()
            self._call(
                self._library.chipset_all_gather, *pointers, num_rows, part.nbytes // num_rows
            )
        return whole

    def _call(self, function: ctypes._NamedFuncPointer, *arguments: int) -> None:
        """Without the interpreter's lock, so that other threads run while this one waits."""
        if self._is_lost:
            raise PeerLost("ranks of this host lost each other before; start them anew")
        ended = function(ctypes.byref(self._group), *arguments)
        if ended == 0:
            return
        self._is_lost = True
        raise PeerLost(
            f"rank {self._group.culprit} of the group {ENDS[ended]}; see what became of that process"
        )


def meet(
    meeting: Meeting, *, library: NativeLibrary | None = None, step_s: float = STEP_S
) -> SharedMemory | str:
    """The memory, or why these ranks cannot share one: the same answer for all of them. Called by all together."""
    path, reason = _build(library or native())
    refused = _first_reason(meeting, "library", reason)
    if path is None or refused:
        return refused
    loaded = _load(path)
    group = Group(
        capacity=CAPACITY,
        timeout_ns=int(step_s * 1e9),
        rank=meeting.index,
        ranks=meeting.size,
        # whoever spins where there are too few cores keeps the one that it waits for from running
        spins=SPINS if meeting.size <= len(os.sched_getaffinity(0)) else SPINS // 20,
    )
    for rank, process in enumerate(meeting.said_by_all("process", str(os.getpid()))):
        group.processes[rank] = int(process)
    size = SEGMENT_START + loaded.chipset_segment_bytes(ctypes.byref(group))
    file, place = _create(size) if meeting.index == 0 else (None, "")
    try:
        memory, reason = _map(meeting.said_by_all("file", place)[0], size)
        refused = _first_reason(meeting, "memory", reason)
    finally:
        if file is not None:
            os.close(file)
    if memory is None or refused:
        return refused
    group.segment = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + SEGMENT_START
    return SharedMemory(loaded, group, memory)


def _build(library: NativeLibrary) -> tuple[Path | None, str]:
    try:
        return library.build(), ""
    except BackendUnavailable as error:
        return None, str(error)


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    group, pointer, count = ctypes.POINTER(Group), ctypes.c_void_p, ctypes.c_uint64
    loaded.chipset_segment_bytes.argtypes = (group,)
    loaded.chipset_segment_bytes.restype = count
    loaded.chipset_all_reduce.argtypes = (group, ctypes.c_int, pointer, pointer, count)
    loaded.chipset_all_gather.argtypes = (group, pointer, pointer, count, count)
    return loaded


def _create(size: int) -> tuple[int | None, str]:
    """An anonymous file, and what others need to open it: process, number there, token."""
    try:
        file = os.memfd_create("chipset-ranks")
        os.ftruncate(file, size)
    except OSError as error:
        return None, f"cannot be made: {error}"
    token = secrets.token_hex(TOKEN_BYTES)
    os.pwrite(file, bytes.fromhex(token), 0)
    return file, f"{os.getpid()} {file} {token}"


def _map(place: str, size: int) -> tuple[mmap.mmap | None, str]:
    """The file that another process holds, or why it is out of reach, such as in another container."""
    process, number, token = place.split(" ", 2)
    try:
        with Path(f"/proc/{process}/fd/{number}").open("r+b", buffering=0) as file:
            if os.pread(file.fileno(), TOKEN_BYTES, 0).hex() != token:
                return None, f"process {process} here is not the one that holds the memory"
            return mmap.mmap(file.fileno(), size), ""
    except OSError as error:
        return None, f"the memory of {place!r} cannot be opened: {error}"


def _first_reason(meeting: Meeting, key: str, reason: str) -> str:
    """Of all ranks."""
    found = meeting.said_by_all(key, reason)
    return next((f"rank {rank}: {said}" for rank, said in enumerate(found) if said), "")
