"""Many clients that leave at random moments; then nothing may be held.

python scripts/lib/disconnects.py [NUMBER]
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from served import Served, served

NUM_AT_ONCE = 24
STAYS_S = (0.05, 0.3, 3.0, 600.0)
"""A visitor leaves at a random moment before one of these: at once, in the queue, in mid-answer, or after it
on the slowest machine too."""
WORDS = [
    "time",
    "river",
    "stone",
    "light",
    "garden",
    "winter",
    "letter",
    "house",
    "music",
    "window",
]
HELD, FREE = "chipset_kv_blocks_held", "chipset_kv_blocks_free"


@dataclass
class Outcome:
    """How many of the requests were answered whole, and how many were left."""

    finished: int = 0
    left: int = 0


def request_bytes(draw: random.Random) -> bytes:
    """A request of random route and length, streamed or not."""
    prompt = " ".join(draw.choices(WORDS, k=draw.randint(1, 60)))
    new = draw.randint(1, 24)
    stream = draw.random() < 0.5
    path, body = draw.choice(
        [
            ("/generate", {"inputs": prompt, "parameters": {"max_new_tokens": new}}),
            ("/generate_stream", {"inputs": prompt, "parameters": {"max_new_tokens": new}}),
            ("/v1/completions", {"prompt": prompt, "max_tokens": new, "stream": stream}),
            (
                "/v1/chat/completions",
                {
                    "messages": [{"role": "user", "content": prompt}],
                    "max_tokens": new,
                    "stream": stream,
                },
            ),
        ]
    )
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


async def visit(host: str, port: int, draw: random.Random, outcome: Outcome) -> None:
    """Send a request, stay for a random while, and leave: with RST, with FIN, or in mid-request."""
    reader, writer = await asyncio.open_connection(host, port)
    data = request_bytes(draw)
    if draw.random() < 0.05:
        data = data[: draw.randrange(len(data))]
    writer.write(data)
    try:
        async with asyncio.timeout(draw.random() * draw.choice(STAYS_S)):
            await writer.drain()
            while await reader.read(4096):
                pass
        outcome.finished += 1
    except (TimeoutError, ConnectionError):
        outcome.left += 1
        if draw.random() < 0.5:
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    finally:
        writer.close()


async def visits(url: str, number: int, seed: int) -> Outcome:
    """`number` visits, some at once."""
    draw, outcome = random.Random(seed), Outcome()
    address = urlsplit(url)
    gate = asyncio.Semaphore(NUM_AT_ONCE)

    async def one(seed: int) -> None:
        async with gate:
            await visit(address.hostname or "", address.port or 0, random.Random(seed), outcome)

    await asyncio.gather(*(one(draw.getrandbits(32)) for _ in range(number)))
    return outcome


def run(server: Served, number: int, seed: int = 0) -> dict[str, float]:
    """Visit, wait for quiet, and say what is held."""
    baseline = server.metric(FREE) + server.metric(HELD)
    outcome = asyncio.run(visits(server.url, number, seed))
    time.sleep(1)  # the gauges are at most half a second old
    held = server.wait_for(HELD, 0)
    return {
        "finished": outcome.finished,
        "left": outcome.left,
        "held": held,
        "free": server.metric(FREE),
        "baseline": baseline,
    }


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as folder, served(Path(folder) / "log.txt") as server:
        print(run(server, number))


if __name__ == "__main__":
    main()
