"""`serve` as a process of its own, on a scripted engine: how it starts, and how it ends."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from .test_client import SCRIPT

RUN = """
import sys
from chipset.server.cli import main
main(sys.argv[3:], [sys.executable, *sys.argv[1:3]])
"""
LIMIT_S = 5


def make_model(folder: Path) -> Path:
    """A model of which only the tokenizer is read."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def runs(process: psutil.Process) -> bool:
    """One that has ended stays a zombie until the first of all processes finds the time to look at it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Running:
    def __init__(self, folder: Path, mode: str, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        arguments = ["serve", str(folder), "--port", str(self.port), "--backend", "cpu", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(SCRIPT), mode, *arguments],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False)
        self.children: list[psutil.Process] = []

    def status(self, path: str) -> int:
        try:
            return self.http.get(path).status_code
        except httpx.TransportError:
            return 0

    def wait(self, path: str, status: int) -> None:
        deadline = time.monotonic() + 20
        while self.status(path) != status:
            assert time.monotonic() < deadline, f"{path} is not {status}"
            assert self.process.poll() is None, self.process.stderr
            time.sleep(0.02)
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def end(self, *signals: signal.Signals) -> tuple[int, float]:
        begun = time.monotonic()
        for one in signals:
            self.process.send_signal(one)
            time.sleep(0.1)
        code = self.process.wait(20)
        while any(map(runs, self.children)) and time.monotonic() - begun < LIMIT_S:
            time.sleep(0.01)
        took = time.monotonic() - begun
        assert not any(map(runs, self.children))
        return code, took

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def running(folder: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    one = Running(folder, *getattr(request, "param", ["serve"]))
    yield one
    one.close()


def stderr(running: Running) -> str:
    assert running.process.stderr is not None
    return running.process.stderr.read()


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(running: Running, which: signal.Signals) -> None:
    running.wait("/ready", 200)
    answer = running.http.post("/generate", json={"inputs": "a"})
    assert answer.json() == {"generated_text": "&&"}
    code, took = running.end(which)
    assert code == 0
    assert took < LIMIT_S
    shown = stderr(running)
    assert f"http://127.0.0.1:{running.port}" in shown
    assert "Script" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("running", [["hang"]], indirect=True)
def test_a_signal_ends_it_while_the_engine_starts(running: Running) -> None:
    running.wait("/ready", 503)
    assert running.status("/health") == 200
    deadline = time.monotonic() + 10
    while not running.children and time.monotonic() < deadline:
        running.wait("/ready", 503)
    code, took = running.end(signal.SIGINT)
    assert code == 0
    assert took < LIMIT_S


@pytest.mark.parametrize("pause_s", [0.1, 0.5, 0.9])
def test_a_signal_at_any_moment_of_start_ends_it(folder: Path, pause_s: float) -> None:
    running = Running(folder, "serve")
    time.sleep(pause_s)
    code, took = running.end(signal.SIGTERM)
    running.close()
    # before Python runs our first line the signal is the system's
    assert code in ((0, -signal.SIGTERM) if pause_s < 0.5 else (0,))
    assert took < LIMIT_S


@pytest.mark.parametrize("running", [["slow", "--shutdown-timeout", "60"]], indirect=True)
def test_a_second_signal_ends_it_at_once(running: Running) -> None:
    running.wait("/ready", 200)
    with running.http.stream("POST", "/generate_stream", json={"inputs": "a"}) as stream:
        next(stream.iter_lines())
        code, took = running.end(signal.SIGINT, signal.SIGINT)
    assert code == 0
    assert took < 1.5


@pytest.mark.parametrize("running", [["slow", "--shutdown-timeout", "0.3"]], indirect=True)
def test_what_still_runs_at_the_end_gets_a_typed_error(running: Running) -> None:
    running.wait("/ready", 200)
    with running.http.stream("POST", "/generate_stream", json={"inputs": "a"}) as stream:
        lines = stream.iter_lines()
        next(lines)
        running.process.send_signal(signal.SIGTERM)
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert events[-1] == {"error": "the server is ending", "error_type": "unhealthy"}
    assert running.end()[0] == 0


DEADLY = {"prompt": [0]}


@pytest.mark.parametrize("running", [["serve", "--max-restarts", "0"]], indirect=True)
def test_an_engine_too_many_ends_the_server_with_its_own_code(running: Running) -> None:
    running.wait("/ready", 200)
    answer = running.http.post("/v1/completions", json=DEADLY)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_died"
    assert running.process.wait(10) == 13
    assert "chipset: error: the engine process ended: the device is gone" in stderr(running)


def engine_of(running: Running) -> psutil.Process:
    [engine] = psutil.Process(running.process.pid).children()
    return engine


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_engine_is_followed_by_another(running: Running, which: signal.Signals) -> None:
    running.wait("/ready", 200)
    first = engine_of(running)
    begun = time.monotonic()
    first.send_signal(which)
    running.wait("/ready", 503)
    assert time.monotonic() - begun < 10
    assert running.status("/health") == 503
    running.wait("/ready", 200)
    assert running.status("/health") == 200
    assert not first.is_running()
    assert running.http.post("/generate", json={"inputs": "a"}).json() == {"generated_text": "&&"}
    assert "chipset_engine_restarts_total 1.0" in running.http.get("/metrics").text
    assert running.end(signal.SIGTERM)[0] == 0


def test_a_request_that_ends_engines_gets_the_error_from_the_second(running: Running) -> None:
    running.wait("/ready", 200)
    answer = running.http.post("/v1/completions", json=DEADLY, timeout=30)
    assert answer.json()["error"]["code"] == "engine_died"
    running.wait("/ready", 200)
    assert "chipset_engine_restarts_total 2.0" in running.http.get("/metrics").text


@pytest.mark.parametrize("running", [["slow"]], indirect=True)
def test_a_stream_that_had_begun_gets_a_typed_error_and_the_next_engine_serves(
    running: Running,
) -> None:
    running.wait("/ready", 200)
    with running.http.stream("POST", "/generate_stream", json={"inputs": "a"}) as stream:
        lines = stream.iter_lines()
        next(lines)
        engine_of(running).kill()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert events[-1]["error_type"] == "generation"
    running.wait("/ready", 200)


def test_a_signal_ends_it_between_two_engines(running: Running) -> None:
    running.wait("/ready", 200)
    engine_of(running).kill()
    running.wait("/ready", 503)
    code, took = running.end(signal.SIGTERM)
    assert code == 0
    assert took < LIMIT_S


def test_a_start_that_fails_is_one_line_and_a_code(folder: Path) -> None:
    running = Running(folder, "refuse")
    assert running.process.wait(20) == 10
    last = stderr(running).splitlines()[-1]
    running.close()
    assert last == "chipset: error: too big"
    assert not running.children


def test_a_port_in_use_is_known_before_anything_is_loaded(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        running = Running(folder, "hang", "--port", port)
        assert running.process.wait(10) == 9
        assert f"port {port} of 127.0.0.1 is in use" in stderr(running)
        running.close()


def test_the_engine_does_not_outlive_a_killed_server(running: Running) -> None:
    running.wait("/ready", 200)
    running.process.kill()
    gone, alive = psutil.wait_procs(running.children, timeout=LIMIT_S)
    assert gone
    assert not alive


def doctor(folder: Path, mode: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, str(SCRIPT), mode, "doctor", "--backend", "cpu", *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_doctor_weighs_a_model_without_serving_it(folder: Path) -> None:
    done = doctor(folder, "serve", "--model-id", str(folder), "--json")
    told = json.loads(done.stdout)["model"]
    assert (told["architecture"], told["weight_bytes"]) == ("Script", 1)
    assert "1 B" in doctor(folder, "serve", "--model-id", str(folder)).stdout


def test_doctor_tells_what_it_can_where_a_model_does_not_load(folder: Path) -> None:
    done = doctor(folder, "refuse", "--model-id", str(folder), "--json")
    assert done.returncode == 10
    assert json.loads(done.stdout)["model"] is None
    assert done.stderr.splitlines()[-1] == "chipset: error: too big"
