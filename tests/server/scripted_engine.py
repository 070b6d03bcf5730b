"""An engine process that draws "ok" and can fail in every way: run by the tests in place of the real one.

MODE (first argument): serve, late, refuse, crash, hang, slow, silent.
"""

import os
import sys
import threading
import time

import msgspec
import zmq

from chipset.core.heartbeat import Heartbeat
from chipset.core.messages import (
    Alive,
    Cancel,
    Fatal,
    Progress,
    Ready,
    StartFailed,
    Stats,
    StepDone,
    Stop,
    Submit,
    Token,
    Tokens,
    decode_command,
    decode_launch,
    encode,
)

READY = Ready(
    backend="cpu", device="script", reason="asked for", architecture="Script", dtype="float32",
    kv_dtype="float32", block_size=16, num_blocks=4, kv_tokens=64, max_context=64,
    max_batch_tokens=64, max_batch_rows=4, max_logprobs=5, max_logit_bias=8,
    features=["sampled", "filters", "logprobs"], weight_bytes=1, reasons={},
)  # fmt: skip


def main(mode: str) -> None:
    launch = decode_launch(sys.stdin.buffer.readline())
    # the end of the parent is the end of this process
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
    context = zmq.Context()
    commands, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    if mode != "late":
        commands.connect(launch.commands)
    events.connect(launch.events)
    if mode != "silent":
        beats = context.socket(zmq.PUSH)
        beats.connect(launch.events)
        Heartbeat(lambda: beats.send(encode(Alive())))

    def send(event: msgspec.Struct) -> None:
        events.send(encode(event))

    send(Progress("load", 1, 2, "B"))
    if mode == "hang":
        # deaf to everything but the end of its input, and late to that
        time.sleep(60)
    if mode == "refuse":
        send(
            StartFailed(
                error="NotEnoughMemory", message="too big", exit_code=10, traceback="Traceback: x"
            )
        )
        context.destroy(linger=1000)
        os._exit(10)
    if mode == "crash":
        os._exit(7)
    send(Progress("load", 2, 2, "B"))
    send(READY)
    if mode == "late":
        # as where the connection takes its time beside a busy machine
        time.sleep(0.3)
        commands.connect(launch.commands)
    while True:
        match decode_command(commands.recv()):
            case Submit() as submit:
                if submit.prompt == [0]:
                    send(Fatal(message="the device is gone", traceback="Traceback: y"))
                    context.destroy(linger=1000)
                    os._exit(1)
                for index in range(40 if mode == "slow" else 2):
                    last = index == 1 and mode != "slow"
                    tokens = Tokens(submit.request_id, [Token(5)], "length" if last else None)
                    send(StepDone([tokens]))
                    if mode == "slow":
                        time.sleep(0.05)
            case Cancel(request_ids):
                send(
                    Stats(
                        **dict.fromkeys(Stats.__struct_fields__, 0)
                        | {"cancelled": len(request_ids), "backend": {}}
                    )
                )
            case Stop():
                os._exit(0)


main(sys.argv[1])
