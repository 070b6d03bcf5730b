"""How long `chipset serve` takes to /ready with the model in the cache, and `chipset --help`.

python scripts/lib/startup_time.py [RUNS]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from served import CHIPSET, served

from chipset.core.loading.resolve import find_model


def help_s() -> float:
    start = time.perf_counter()
    subprocess.run([CHIPSET, "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def ready_s() -> float:
    with tempfile.TemporaryDirectory() as folder, served(Path(folder) / "log.txt") as server:
        return server.start_s


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    find_model(None)
    for name, measure, bound in (
        ("chipset --help", help_s, 0.5),
        ("chipset serve to /ready", ready_s, 10),
    ):
        seen = [measure() for _ in range(runs)]
        print(
            f"{name:24} median {statistics.median(seen):.2f} s of {runs} "
            f"({min(seen):.2f} to {max(seen):.2f}; aim {bound} s)"
        )


if __name__ == "__main__":
    main()
