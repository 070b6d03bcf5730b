"""Fields that are known but not built are refused by name; their neutral values and unknown fields are not."""

import pytest

from chipset.server.unbuilt import CHAT, COMPLETION, NATIVE

from .fakes import FakeEngine, LiveServer

USES = {
    "n": 2,
    "best_of": 2,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "length_penalty": 2.0,
    "reasoning_effort": "high",
    "verbosity": "low",
    "modalities": ["audio"],
    "prompt_logprobs": 3,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
}
"""A value that asks for something; for switches and texts it is made up below."""


def use(name: str, neutral: tuple[object, ...]) -> object:
    if name in USES:
        return USES[name]
    if False in neutral:
        return True
    return {"some": "thing"} if {} in neutral else ["thing"] if [] in neutral else "thing"


CASES = [
    *(("/v1/chat/completions", name) for name in CHAT),
    *(("/v1/completions", name) for name in COMPLETION),
    *(("/generate", name) for name in NATIVE),
]
TABLES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION, "/generate": NATIVE}


def request_body(path: str, name: str, value: object) -> dict[str, object]:
    if path == "/generate":
        return {"inputs": "a", "parameters": {name: value}}
    start: dict[str, object] = (
        {"prompt": "a"}
        if path == "/v1/completions"
        else {"messages": [{"role": "user", "content": "a"}]}
    )
    return {**start, name: value}


@pytest.mark.parametrize(("path", "name"), CASES)
def test_a_use_of_it_is_refused_by_name(
    server: LiveServer, engine: FakeEngine, path: str, name: str
) -> None:
    response = server.post(path, request_body(path, name, use(name, TABLES[path][name])))
    if path == "/generate":
        assert response.status_code == 422
        assert f"`{name}` is not served yet" in response.json()["error"]
    else:
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name
    assert engine.submitted == []


@pytest.mark.parametrize(("path", "name"), CASES)
def test_its_neutral_values_are_no_use_of_it(server: LiveServer, path: str, name: str) -> None:
    for value in (None, *TABLES[path][name]):
        assert server.post(path, request_body(path, name, value)).status_code == 200


def test_one_is_no_switch_and_true_no_count(server: LiveServer) -> None:
    for name, value in (("n", True), ("echo", 0)):
        response = server.post("/v1/completions", {"prompt": "a", name: value})
        assert response.status_code == 400


@pytest.mark.parametrize("field", ["user", "metadata", "store", "service_tier", "what_is_this"])
def test_fields_that_change_no_text_are_accepted(server: LiveServer, field: str) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], field: {"a": "b"}}
    assert server.post("/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
            "content",
        ),
        ({"role": "tool", "content": "4", "tool_call_id": "1"}, "tool_call_id"),
        ({"role": "tool", "content": "4"}, "role"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "tool_calls"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user", "content": [{"type": "text", "text": 4}]}, "content"),
    ],
)
def test_messages_that_are_more_than_text_are_refused(
    server: LiveServer, message: dict[str, object], param: str
) -> None:
    response = server.post("/v1/chat/completions", {"messages": [message]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == f"messages[0].{param}"
