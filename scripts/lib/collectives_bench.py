"""How long ranks of this host take for a sum: medians, by shared memory and by gloo.

python scripts/lib/collectives_bench.py [RANKS]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch

from chipset.backends.conformance.session import make_launch
from chipset.backends.conformance.suite import small_model
from chipset.backends.options import EngineOptions, ParallelOptions
from chipset.backends.reference.collectives import GlooCollectives, RankCollectives
from chipset.backends.reference.rendezvous import serve
from chipset.plugins.cpu.collectives import CPUCollectives
from chipset.plugins.cpu.plugin import CPUPlugin

MEET_S = 60
SIZES = {"4 KB": 4 << 10, "100 KB": 100 << 10, "1 MB": 1 << 20, "8 MB": 8 << 20}
DTYPES = (torch.float32, torch.bfloat16)


def measure(comm: RankCollectives, num_bytes: int, dtype: torch.dtype) -> list[float]:
    """Seconds of each of some sums, ascending."""
    x = torch.randn(num_bytes // dtype.itemsize).to(dtype)
    taken = []
    for _ in range(300 if num_bytes < 1 << 20 else 50):
        began = time.perf_counter()
        comm.all_reduce(x, "tensor")
        taken.append(time.perf_counter() - began)
    return sorted(taken)


@torch.inference_mode()
def run(rank: int, size: int, address: str) -> None:
    torch.set_num_threads(1)
    options = EngineOptions(parallel=ParallelOptions(tensor=size))
    launch = make_launch(CPUPlugin(), small_model(), options, rank=rank, rendezvous=address)
    shared, gloo = CPUCollectives(launch), GlooCollectives(launch)
    assert not shared.reasons, shared.reasons
    for name, num_bytes in SIZES.items():
        for dtype in DTYPES:
            for way, comm in (("shared memory", shared), ("gloo", gloo)):
                taken = measure(comm, num_bytes, dtype)
                median, p90 = taken[len(taken) // 2] * 1e6, taken[len(taken) * 9 // 10] * 1e6
                if rank == 0:
                    what = f"{name:>6} {str(dtype).removeprefix('torch.'):8} {way:13}"
                    print(f"{what} median {median:9.1f} µs   p90 {p90:9.1f} µs", flush=True)


def main() -> None:
    if len(sys.argv) == 4:
        run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
        return
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    store, address = serve(MEET_S)
    print(f"all_reduce, {size} ranks on {os.cpu_count()} cores")
    command = [sys.executable, "-P", __file__]
    ranks = [subprocess.Popen([*command, str(r), str(size), address]) for r in range(size)]
    codes = [rank.wait() for rank in ranks]
    del store
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
