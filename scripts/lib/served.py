"""A real `chipset serve` in a process of its own, for scripts and tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHIPSET = str(Path(sys.executable).parent / "chipset")
START_TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that is ready."""

    url: str
    process: subprocess.Popen[str]
    start_s: float
    """From the command to /ready."""
    log: Path

    def get(self, path: str) -> str:
        """The body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        """The value of a metric that has one sample."""
        found = re.search(
            rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", self.get("/metrics"), re.MULTILINE
        )
        if found is None:
            raise KeyError(name)
        return float(found.group(1))

    def wait_for(self, name: str, value: float, timeout_s: float = 20) -> float:
        """The metric's value once it is `value`, or what it is after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while (seen := self.metric(name)) != value and time.monotonic() < end:
            time.sleep(0.05)
        return seen


@contextmanager
def served(log: Path, *flags: str, checkout: Path | None = None) -> Iterator[Served]:
    """Start `chipset serve FLAGS` on a free port of 127.0.0.1, wait for /ready, and stop it in the end.

    `checkout`: run the code of that one, in this environment.
    """
    command = [CHIPSET, "serve", "--backend", "cpu", "--port", "0", *flags]
    environment = dict(os.environ)
    if checkout is not None:
        environment["PYTHONPATH"] = str(checkout.resolve() / "src")
    start = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, text=True, env=environment
        )
    try:
        url = _wait(process, log, start + START_TIMEOUT_S)
        yield Served(url=url, process=process, start_s=time.monotonic() - start, log=log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[str], log: Path, deadline: float) -> str:
    while time.monotonic() < deadline:
        text = log.read_text()
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{text}")
        found = re.search(r"^\s*serving\s+(http\S+)", text, re.MULTILINE)
        if found and _is_ready(found.group(1)):
            return found.group(1)
        time.sleep(0.02)
    raise TimeoutError(f"the server is not ready:\n{log.read_text()}")


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return False
