"""A client that leaves is noticed, and its request cancelled, whatever it was waiting for."""

import contextlib
import json
import random
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from .fakes import FakeEngine, LiveServer

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
REQUESTS = [
    ("/generate", {"inputs": "a"}),
    ("/generate_stream", {"inputs": "a"}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 200}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 200, "stream": True}),
]


def until(condition: Callable[[], bool], what: str, limit_s: float = 5) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def send(server: LiveServer, path: str, body: object) -> socket.socket:
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=5)
    encoded = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(encoded)}\r\n\r\n"
    )
    connection.sendall(head.encode() + encoded)
    return connection


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_its_requests_are_cancelled_and_its_places_given_back(
    server: LiveServer, engine: FakeEngine, path: str, body: dict[str, object]
) -> None:
    engine.reset("x" * 300, delay_s=0.02)
    count = len(body.get("prompt", "a"))
    connection = send(server, path, body)
    until(lambda: len(engine.submitted) == count, "the request did not arrive")
    connection.close()
    until(lambda: len(engine.cancelled) == count, "the request was not cancelled")
    until(lambda: server.service.admission.in_flight == 0, "its place was not given back")


def test_leaving_at_any_moment_leaves_nothing_behind(
    server: LiveServer, engine: FakeEngine
) -> None:
    draw = random.Random(7)
    engine.reset("x" * 20, delay_s=0.002)
    for _ in range(40):
        path, body = draw.choice(REQUESTS)
        connection = send(server, path, body)
        time.sleep(draw.uniform(0, 0.03))
        if draw.random() < 0.5:
            # reset instead of an orderly end
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        with contextlib.suppress(OSError):
            connection.close()
    until(lambda: server.service.admission.in_flight == 0, "places were not given back")
    assert server.post("/generate", {"inputs": "a"}).status_code == 200


def test_half_a_body_holds_nothing(server: LiveServer, engine: FakeEngine) -> None:
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=5)
    head = (
        f"POST /generate HTTP/1.1\r\nHost: {address.netloc}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    connection.sendall(head.encode())
    connection.close()
    assert server.post("/generate", {"inputs": "a"}).status_code == 200
    assert len(engine.submitted) == 1
    assert server.service.admission.in_flight == 0
