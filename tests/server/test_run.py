"""`chipset run` on a scripted engine: piped, with a prompt, and in a terminal."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_client import SCRIPT
from .test_serving import RUN, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def arguments(folder: Path, mode: str, *more: str) -> list[str]:
    return [
        sys.executable, "-c", RUN, str(SCRIPT), mode, "run", str(folder), *more, "--backend", "cpu",
    ]  # fmt: skip


def test_a_prompt_is_answered_and_that_is_all(folder: Path) -> None:
    done = subprocess.run(
        arguments(folder, "serve", "hi"), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "&&\n")


def test_each_line_of_a_pipe_is_a_turn(folder: Path) -> None:
    done = subprocess.run(
        arguments(folder, "serve"),
        input="hi\n\nagain\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "&&\n&&\n")


def test_a_prompt_that_is_too_long_is_one_line_and_no_bug(folder: Path) -> None:
    done = subprocess.run(
        arguments(folder, "serve", "x" * 100), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("chipset: error: `inputs` must have less than 64 tokens")
    assert "bug" not in last


class Terminal:
    """A person at a keyboard."""

    def __init__(self, command: list[str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: _control(slave),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def expect(self, text: str, limit_s: float = 20) -> None:
        """Wait for it, after what was expected before."""
        deadline = time.monotonic() + limit_s
        while text not in self.seen:
            assert time.monotonic() < deadline, (text, self.seen)
            if select.select([self._master], [], [], 0.1)[0]:
                self.seen += os.read(self._master, 4096).decode()
        self.seen = self.seen.split(text, 1)[1]

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


def _control(slave: int) -> None:
    """The terminal sends its Ctrl-C to who controls it."""
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    one = Terminal(arguments(folder, "slow"))
    yield one
    one.close()


def test_ctrl_c_stops_the_answer_and_exit_the_conversation(terminal: Terminal) -> None:
    terminal.expect("/exit ends")
    terminal.expect(">>> ")
    terminal.type("hi\n")
    terminal.expect("&&&")
    terminal.type("\x03")
    terminal.expect(">>> ")
    terminal.type("/exit\n")
    assert terminal.process.wait(10) == 0


def test_ctrl_c_without_an_answer_ends_the_conversation(terminal: Terminal) -> None:
    terminal.expect(">>> ")
    terminal.type("\x03")
    assert terminal.process.wait(10) == 0


def test_the_end_of_input_ends_the_conversation(terminal: Terminal) -> None:
    terminal.expect(">>> ")
    terminal.type("\x04")
    assert terminal.process.wait(10) == 0
