"""Workers that keep to a script, and no torch: MODE is serve, silent, deaf, die, fail or babble.

python scripted.py MODE FD
"""

import os
import socket
import sys
import time

import msgspec

from chipset.core.executors.link import Link
from chipset.core.heartbeat import Heartbeat


def main(mode: str, link: Link) -> None:
    def send(kind: str, **fields: object) -> None:
        link.send(msgspec.msgpack.encode({"type": kind, **fields}))

    if mode != "silent":
        Heartbeat(lambda: send("Beat"))
    if mode == "deaf":
        time.sleep(60)
    if mode == "fail":
        send("StartFailed", error="NotEnoughMemory", message="x", exit_code=10, traceback="T")
    send("Loaded", weights={"held_bytes": 7, "kernels": {}})
    while True:
        order = msgspec.msgpack.decode(link.receive())
        if order.get("type") == "Budget":
            if mode == "die":
                os._exit(3)
            if mode == "babble":
                link.send(b"\xc1")
            send("Answer", value=42)
        elif order.get("type") == "Close":
            os._exit(0)
        elif "type" in order:
            send("Answer", value=None)


if __name__ == "__main__":
    main(sys.argv[1], Link(socket.socket(fileno=int(sys.argv[2]))))
