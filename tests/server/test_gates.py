"""Key, host and body are checked before any route sees the request."""

import asyncio
from collections.abc import Iterator

import pytest
from starlette.routing import Route

from chipset.server.app import create_app
from chipset.server.auth import OPEN_PATHS
from chipset.server.body import BodyLimit
from chipset.server.hosts import is_loopback
from chipset.server.service import Service
from chipset.server.settings import ServerSettings

from .fakes import FakeEngine, LiveServer, live_server

KEY = "s3cret"


def routes() -> list[tuple[str, str]]:
    app = create_app(Service(ServerSettings()))
    found = [
        (method, path) for path, methods in app.openapi()["paths"].items() for method in methods
    ]
    plain = [
        (method.lower(), route.path)
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
    ]
    return sorted({*found, *plain})


@pytest.fixture(scope="module")
def locked() -> Iterator[LiveServer]:
    with live_server(FakeEngine(), api_key=KEY) as server:
        yield server


def test_every_route_but_the_open_ones_wants_the_key(locked: LiveServer) -> None:
    seen = set()
    for method, path in routes():
        response = locked.http.request(method, path, json={})
        seen.add(path)
        assert (response.status_code == 401) == (path not in OPEN_PATHS), (method, path)
    assert {"/generate", "/v1/models", "/metrics", "/info", "/openapi.json"} <= seen
    unknown = locked.get("/nothing")
    assert unknown.status_code == 401
    assert unknown.headers["www-authenticate"] == "Bearer"
    assert locked.get("/v1/x").json()["error"]["type"] == "unauthorized"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Authorization", f"Bearer {KEY}")], 200),
        ([("authorization", f"bearer {KEY}")], 200),
        ([("x-api-key", KEY)], 200),
        ([("Authorization", KEY)], 401),
        ([("Authorization", f"Bearer {KEY.upper()}")], 401),
        ([("Authorization", f"Bearer {KEY}x")], 401),
        ([("Authorization", "Bearer")], 401),
        ([("x-api-key", "wrong"), ("Authorization", f"Bearer {KEY}")], 401),
        ([("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {KEY}")], 401),
    ],
)
def test_the_key_is_taken_in_either_header(
    locked: LiveServer, headers: list[tuple[str, str]], status: int
) -> None:
    assert locked.get("/info", headers=headers).status_code == status


def test_metrics_can_be_opened() -> None:
    with live_server(FakeEngine(), api_key=KEY, public_metrics=True) as server:
        assert server.get("/metrics").status_code == 200
        assert server.get("/info").status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8080", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("LOCALHOST", 200),
        ("localhost.evil.com", 403),
        ("notlocalhost", 403),
        ("evil.com:8080", 403),
        ("127.0.0.1.evil.com", 403),
        ("", 403),
    ],
)
def test_a_server_on_loopback_answers_only_its_own_names(
    server: LiveServer, host: str, status: int
) -> None:
    assert server.get("/info", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://evil.com", 403),
        ("null", 403),
        ("http://localhost:9", 200),
        ("https://localhost", 403),
    ],
)
def test_pages_of_other_origins_may_not_post(server: LiveServer, origin: str, status: int) -> None:
    headers = {"Origin": origin, "Host": "localhost:9"}
    assert server.post("/generate", {"inputs": "a"}, headers=headers).status_code == status
    assert "access-control-allow-origin" not in server.get("/info", headers=headers).headers


def test_addresses_of_this_machine_alone() -> None:
    assert [host for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost") if is_loopback(host)]
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"))


def test_a_body_above_the_limit_is_413_even_when_its_length_is_not_told() -> None:
    with live_server(FakeEngine(), payload_limit=1000) as server:
        for content in (b"x" * 1001, iter([b"x" * 600] * 2)):
            response = server.http.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code == 413
            assert response.json()["error"]["type"] == "payload_too_large"
        assert server.post("/generate", {"inputs": "a"}).status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_said_to_be_json_is_415(server: LiveServer, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = server.http.post("/generate", content=b'{"inputs": "a"}', headers=headers)
    assert response.status_code == 415
    assert response.json()["error_type"] == "unsupported_media_type"


def test_json_may_name_its_charset(server: LiveServer) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    response = server.http.post("/generate", content=b'{"inputs": "a"}', headers=headers)
    assert response.status_code == 200


def test_headers_are_bounded_and_do_not_name_the_server(server: LiveServer) -> None:
    response = server.get("/health", headers={"x-long": "a" * 1_000_000})
    assert response.status_code in (400, 431)
    assert "server" not in server.get("/health").headers


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError

    async def never() -> dict[str, object]:
        await asyncio.Event().wait()
        raise AssertionError

    sent: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": headers}
    asyncio.run(BodyLimit(app, limit=10, timeout_s=0.05)(scope, never, send))
    assert sent[0]["status"] == 408


def test_a_server_for_the_network_answers_to_every_name() -> None:
    with live_server(FakeEngine(), host="0.0.0.0", api_key=KEY) as server:
        headers = {
            "Host": "models.example.org",
            "x-api-key": KEY,
            "Origin": "https://ui.example.org",
        }
        assert server.post("/generate", {"inputs": "a"}, headers=headers).status_code == 200
