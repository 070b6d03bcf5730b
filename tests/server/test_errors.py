"""What failures look like from outside, in both dialects."""

import json
import re

import pytest

from chipset.core.errors import EngineDied, InvalidRequest, RequestFailed
from chipset.server.errors import NotReady

from .fakes import FakeEngine, LiveServer, live_server

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
FAILURES = [
    (InvalidRequest("no"), 422, "validation", 400, "invalid_request_error"),
    (RequestFailed("a step failed"), 424, "generation", 500, "server_error"),
    (EngineDied("gone"), 503, "generation", 503, "service_unavailable"),
    (NotReady("the server is ending"), 503, "unhealthy", 503, "service_unavailable"),
]


@pytest.mark.parametrize(("failure", "native", "kind", "openai", "openai_kind"), FAILURES)
def test_a_failure_has_its_status_and_type_in_both_dialects(
    server: LiveServer,
    engine: FakeEngine,
    failure: Exception,
    native: int,
    kind: str,
    openai: int,
    openai_kind: str,
) -> None:
    engine.failure = failure
    response = server.post("/generate", {"inputs": "a"})
    assert (response.status_code, response.json()["error_type"]) == (native, kind)
    response = server.post("/v1/chat/completions", CHAT)
    assert response.status_code == openai
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == openai_kind


@pytest.mark.parametrize(("failure", "native", "kind", "openai", "openai_kind"), FAILURES)
def test_a_failure_in_a_stream_is_its_last_event(
    server: LiveServer,
    engine: FakeEngine,
    failure: Exception,
    native: int,
    kind: str,
    openai: int,
    openai_kind: str,
) -> None:
    engine.failure = failure
    response = server.post("/generate_stream", {"inputs": "a"})
    assert response.status_code == 200
    last = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))
    assert last["error_type"] == kind
    *_, last_chat, done, empty = server.post(
        "/v1/chat/completions", CHAT | {"stream": True}
    ).text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    assert json.loads(last_chat.removeprefix("data: "))["error"]["type"] == openai_kind


def test_a_bug_says_nothing_of_itself(server: LiveServer, engine: FakeEngine) -> None:
    engine.failure = ZeroDivisionError("/home/secret/path 0x7f00")
    for path, body in (("/generate", {"inputs": "a"}), ("/v1/chat/completions", CHAT)):
        response = server.post(path, body)
        assert response.status_code == 500
        assert response.headers["x-should-retry"] == "false"
        assert not re.search(r"secret|0x|Zero|Traceback", response.text)
    streamed = server.post("/generate_stream", {"inputs": "a"})
    assert "Internal server error" in streamed.text
    assert "secret" not in streamed.text


def test_validation_errors_of_a_native_stream_are_events_of_a_200(server: LiveServer) -> None:
    response = server.post("/generate_stream", {"inputs": ""})
    assert response.status_code == 200
    [event, empty] = response.text.split("\n\n")
    assert empty == ""
    assert json.loads(event.removeprefix("data: ")) == {
        "error": "Input validation error: `inputs` cannot be empty",
        "error_type": "validation",
    }


def test_template_errors_have_a_type_of_their_own_natively(server: LiveServer) -> None:
    body = {"messages": [{"role": "martian", "content": "hi"}]}
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert "martians" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/nothing", "/nothing"])
def test_unknown_paths_and_methods_are_typed(server: LiveServer, path: str) -> None:
    for response, status in ((server.get(path), 404), (server.get("/generate"), 405)):
        assert response.status_code == status
        assert "error" in response.json()


def test_a_request_above_the_limit_is_told_to_come_again() -> None:
    engine = FakeEngine("x" * 40, delay_s=0.02)
    with live_server(engine, max_concurrent_requests=1) as server:
        with server.http.stream("POST", "/generate_stream", json={"inputs": "a"}) as stream:
            lines = stream.iter_lines()
            next(lines)
            native = server.post("/generate", {"inputs": "a"})
            chat = server.post("/v1/chat/completions", CHAT)
            streamed = server.post("/generate_stream", {"inputs": "a"})
            list(lines)
        assert native.status_code == chat.status_code == 429
        assert int(native.headers["retry-after"]) >= 1
        assert native.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
        assert chat.json()["error"]["code"] == "rate_limit_exceeded"
        assert "overloaded" in streamed.text
        assert server.post("/generate", {"inputs": "a"}).status_code == 200
        assert server.service.admission.in_flight == 0


def test_a_batch_needs_as_many_places_as_it_has_prompts() -> None:
    with live_server(FakeEngine(), max_concurrent_requests=2) as server:
        for count, status in ((2, 200), (3, 429), (2, 200)):
            response = server.post("/v1/completions", {"prompt": ["a"] * count})
            assert response.status_code == status


def test_before_the_model_is_loaded_everything_but_health_is_503() -> None:
    with live_server(None) as server:
        assert server.get("/health").status_code == 200
        ready = server.get("/ready")
        assert ready.status_code == 503
        assert "loading" in ready.text
        for path, body in (("/generate", {"inputs": "a"}), ("/v1/chat/completions", CHAT)):
            response = server.post(path, body)
            assert response.status_code == 503
            assert "retry-after" in response.headers
        assert server.get("/info").status_code == 503
        assert server.get("/v1/models").status_code == 503
        assert server.get("/metrics").status_code == 200


def test_an_ending_server_is_alive_but_not_ready_and_a_dead_one_is_neither() -> None:
    with live_server(FakeEngine()) as server:
        assert server.get("/ready").status_code == 200
        server.service.end()
        assert server.get("/health").status_code == 200
        assert server.get("/ready").status_code == 503
        assert server.post("/generate", {"inputs": "a"}).status_code == 503
        server.service.end(dead=True)
        assert server.get("/health").status_code == 503
        assert server.get("/ready").status_code == 503
