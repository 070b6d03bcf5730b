"""What strangers find: chipset's wheel and a plugin of somebody else's, in an environment of their own.

Takes many minutes; scripts/test-strangers runs it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tutorial

from . import abacus
from .fresh import CHECKOUT, Fresh

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(3600)]
CLAIMED = re.compile(
    r"not claimed|does not claim|no kernel for \w+ weights|do not overlap here|are not mixed here"
    r"|no graph depends on a predicted size here|each device has a worker of its own"
)
"""Why a case may be skipped: the plugin said so, in its capabilities, policies or verdicts."""
START_S = 600


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """In STRANGERS_FOLDER, where that is set: what is installed there already need not be fetched again."""
    kept = os.environ.get("STRANGERS_FOLDER")
    work = tmp_path_factory.mktemp("strangers")
    return Fresh.make(Path(kept).resolve() if kept else work, work)


def summary(output: str) -> tuple[int, list[str]]:
    """How many cases passed, and why others were skipped."""
    last = output.strip().splitlines()[-1]
    found = re.fullmatch(r"(\d+) passed, 0 failed, \d+ skipped", last)
    assert found is not None, last
    return int(found[1]), re.findall(r"^\d+ skipped: (.+)$", output, re.MULTILINE)


@contextmanager
def serving(fresh: Fresh, *flags: str) -> Iterator[str]:
    """The address of a server of the default model."""
    command = ["chipset", "serve", "--backend", "abacus", "--port", "0", *flags]
    log = fresh.work / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [fresh.venv / "bin" / command[0], *command[1:]],
            cwd=fresh.work,
            env=fresh.environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _address(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        found = re.search(r"^\s*serving\s+(http\S+)", log.read_text(), re.MULTILINE)
        if found and _ready(found[1]):
            return found[1]
        time.sleep(0.5)
    raise AssertionError(f"not ready after {START_S} s\n{log.read_text()}")


def _ready(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/ready", timeout=5).close()
    except OSError:
        return False
    return True


def ask(url: str, path: str, body: object = None) -> Any:
    """The answer to a POST of `body`, or to a GET without."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def test_the_wheel_holds_every_file_of_its_packages(fresh: Fresh) -> None:
    where = fresh.run(
        "python -P -c 'import chipset, pathlib; print(pathlib.Path(chipset.__file__).parent)'"
    )
    package = Path(where.strip())
    assert package.is_relative_to(fresh.venv)
    folders = ("core", "backends", "plugins", "server", "docs/evidence")
    listed = subprocess.run(
        ["git", "ls-files", *folders], cwd=CHECKOUT, check=True, capture_output=True, text=True
    ).stdout.split()
    kinds = {Path(name).suffix for name in listed}
    assert {".py", ".cpp", ".json"} <= kinds
    missing = [name for name in listed if not (package / name).is_file()]
    assert not missing


def test_nothing_that_is_installed_misses_what_it_needs(fresh: Fresh) -> None:
    fresh.run("python -m pip check")


def test_the_abacus_passes_the_whole_kit(fresh: Fresh) -> None:
    passed, skipped = summary(fresh.run("chipset conformance --backend abacus"))
    assert passed > 300
    undeclared = [reason for reason in skipped if not CLAIMED.search(reason)]
    assert not undeclared


def test_its_own_tests_pass(fresh: Fresh) -> None:
    tests = fresh.work / "abacus-tests"
    shutil.copytree(abacus.ROOT / "tests", tests)
    fresh.run(f"python -P -m pytest -q --import-mode=importlib {tests}")


def test_the_default_model_is_served_on_it(fresh: Fresh) -> None:
    question = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 8}}
    with serving(fresh) as url:
        assert "Paris" in ask(url, "/generate", question)["generated_text"]
        metrics = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    assert re.search(r"attention_blocks\D* [1-9]", metrics)


def test_the_tutorial_can_be_followed_to_the_letter(fresh: Fresh) -> None:
    folder = fresh.work / "tutorial"
    folder.mkdir()
    said = []
    for step in tutorial.steps():
        if step.does == "write":
            tutorial.write(step, folder)
        elif step.does == "run":
            for command in step.text.splitlines():
                said.append((command, fresh.run(command, folder=folder)))
    kits = [summary(output) for command, output in said if " conformance " in command]
    assert len(kits) == 2
    assert all(passed > 200 for passed, _ in kits)
    (doctor,) = [output for command, output in said if command == "chipset doctor"]
    assert "pebble" in doctor
