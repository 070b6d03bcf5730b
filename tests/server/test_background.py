"""Work in the background is waited for while somebody wants it, and keeps nothing alive."""

import asyncio
import subprocess
import sys
import time

import psutil
import pytest

from chipset.server.background import in_background


def test_it_returns_and_raises_what_the_work_does() -> None:
    assert asyncio.run(in_background(lambda: 7)) == 7
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_background(lambda: 1 // 0))


def test_a_process_that_leaves_takes_its_children_along_and_waits_for_no_thread() -> None:
    code = """
import asyncio, subprocess, sys
from chipset.server.background import in_background, is_busy, leave

def download():
    subprocess.run([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"])

async def main():
    working = asyncio.create_task(in_background(download))
    await asyncio.sleep(1)
    working.cancel()

asyncio.run(main())
assert is_busy()
leave(5)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    children = psutil.Process(process.pid).children(recursive=True)
    begun = time.monotonic()
    assert process.wait(10) == 5
    assert time.monotonic() - begun < 5
    process.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
