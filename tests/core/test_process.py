"""The engine process: commands in, events out, and an end when its parent ends."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq
from fakes import continuation, null_engine, submit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chipset.backends.options import EngineOptions
from chipset.core.files import ModelFiles
from chipset.core.messages import (
    Cancel,
    EngineLaunch,
    Rejected,
    StartFailed,
    Stats,
    StepDone,
    Stop,
    decode_event,
    decode_launch,
    encode,
    encode_launch,
)
from chipset.core.process import Channel, EngineLoop

TIMEOUT_MS = 20_000


def make_launch(folder, **fields):
    path = Path(folder) / "absent"
    files = ModelFiles(
        source="absent",
        name="absent",
        revision=None,
        config=path / "config.json",
        tokenizer=path / "tokenizer.json",
        tokenizer_config=None,
        chat_template=None,
        generation_config=None,
        weights=(path / "model.safetensors",),
    )
    defaults = {"backend": "cpu", "options": EngineOptions(), "files": files}
    return EngineLaunch(
        commands=f"ipc://{folder}/commands", events=f"ipc://{folder}/events", **(defaults | fields)
    )


class Parent:
    """The API process's end of the sockets."""

    def __init__(self, launch):
        self.context = zmq.Context()
        self.commands = self.context.socket(zmq.PUSH)
        self.events = self.context.socket(zmq.PULL)
        self.commands.bind(launch.commands)
        self.events.bind(launch.events)
        self.events.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)

    def send(self, command):
        self.commands.send(command if isinstance(command, bytes) else encode(command))

    def receive(self, kind):
        """The next event of a kind, the others skipped."""
        while True:
            event = decode_event(self.events.recv())
            if isinstance(event, kind):
                return event

    def close(self):
        self.context.destroy(linger=0)


@contextmanager
def running_loop(folder):
    launch = make_launch(folder)
    parent, channel = Parent(launch), Channel(launch)
    engine = null_engine()
    thread = threading.Thread(target=EngineLoop(engine, channel).run)
    thread.start()
    try:
        yield parent, engine
    finally:
        parent.send(Stop())
        thread.join(20)
        channel.close()
        parent.close()
    assert not thread.is_alive()


def read_text(parent, request_id):
    ids = []
    while True:
        for output in parent.receive(StepDone).outputs:
            if output.request_id == request_id:
                ids += [token.id for token in output.tokens]
                if output.finish_reason:
                    return ids


def test_a_request_is_answered_with_its_tokens(tmp_path):
    with running_loop(tmp_path) as (parent, _):
        parent.send(submit(1, range(10), 6))
        assert read_text(parent, 1) == continuation(range(10), 6)


def test_a_request_that_can_never_run_is_rejected_by_its_id(tmp_path):
    with running_loop(tmp_path) as (parent, _):
        parent.send(submit(7, range(300), 6))
        rejected = parent.receive(Rejected)
        assert rejected.request_id == 7
        assert "room" in rejected.message


def test_a_cancelled_request_holds_nothing(tmp_path):
    with running_loop(tmp_path) as (parent, engine):
        parent.send(submit(1, range(10), 200))
        parent.receive(StepDone)
        parent.send(Cancel([1, 99]))
        while parent.receive(Stats).running:
            pass
        assert engine.scheduler.kv.num_held == 0


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(frames=st.lists(st.binary(max_size=200), min_size=10, max_size=60))
def test_frames_that_are_no_commands_are_dropped_and_the_engine_goes_on(tmp_path, frames):
    whole = encode(submit(1, range(10), 3))
    with running_loop(tmp_path) as (parent, _):
        for frame in [*frames, whole[:-3], whole[3:], b""]:
            if frame != encode(Stop()):
                parent.send(frame)
        parent.send(submit(2, range(10), 3))
        assert read_text(parent, 2) == continuation(range(10), 3)


def test_a_launch_survives_the_way_through_json(tmp_path):
    launch = make_launch(tmp_path, options=EngineOptions(max_context=5, kv_bytes=7))
    assert decode_launch(encode_launch(launch)) == launch


@pytest.fixture
def parent_of():
    parents = []

    def make(launch):
        parents.append(Parent(launch))
        return parents[-1]

    yield make
    for parent in parents:
        parent.close()


@pytest.fixture
def engine_process():
    processes = []

    def start():
        command = [sys.executable, "-P", "-m", "chipset.core.process"]
        processes.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stderr.close()


def test_a_start_that_fails_says_why_and_ends_with_the_errors_code(
    tmp_path, engine_process, parent_of
):
    launch = make_launch(tmp_path, backend="gaudi")
    parent, process = parent_of(launch), engine_process()
    process.stdin.write(encode_launch(launch) + b"\n")
    failed = parent.receive(StartFailed)
    assert failed.error == "BackendUnavailable"
    assert "--backend cpu" in failed.message
    assert process.wait(20) == failed.exit_code == 11


def test_a_file_that_is_missing_is_a_typed_failure(tmp_path, engine_process, parent_of):
    launch = make_launch(tmp_path)
    parent, process = parent_of(launch), engine_process()
    process.stdin.write(encode_launch(launch) + b"\n")
    failed = parent.receive(StartFailed)
    assert "config.json" in failed.message
    assert failed.error == "ModelFormatError"
    assert process.wait(20) == 7


def test_it_ends_when_its_input_closes_before_the_launch(engine_process):
    process = engine_process()
    process.stdin.close()
    assert process.wait(20) == 0


def test_it_ends_when_its_input_closes_while_it_loads(tmp_path, engine_process):
    process = engine_process()
    (folder := tmp_path / "sockets").mkdir()
    process.stdin.write(encode_launch(make_launch(folder)) + b"\n")
    process.stdin.close()
    assert process.wait(20) == 0
    assert not folder.exists(), "what a killed parent left is still there"


def test_a_terminals_interrupt_is_left_to_the_parent(tmp_path, engine_process, parent_of):
    launch = make_launch(tmp_path)
    parent, process = parent_of(launch), engine_process()
    process.stdin.write(encode_launch(launch) + b"\n")
    parent.receive(StartFailed)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGINT)
    assert process.wait(20) == 7
