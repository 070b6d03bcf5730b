"""Whatever number is sent, the answer is 200, 400 or 422, and the next request is served."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .fakes import FakeEngine, LiveServer

HOSTILE = [
    "-9223372036854775808", "-1", "0", "1", "2147483647", "2147483648", "9223372036854775808",
    "18446744073709551616", "1e308", "1e999", "-1e308", "NaN", "Infinity", '"NaN"', '"1"', "null",
    "true", "[]", "{}", "[1]", "0.5", "-0.0", '"\\ud800"',
]  # fmt: skip
OPENAI = [
    "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty",
    "frequency_penalty", "presence_penalty", "seed", "stop", "stop_token_ids", "max_tokens",
    "max_completion_tokens", "min_tokens", "ignore_eos", "logprobs", "top_logprobs", "logit_bias",
    "stream_options", "model", "messages", "prompt", "n", "best_of", "cache_salt",
]  # fmt: skip
NATIVE = [
    "temperature", "repetition_penalty", "frequency_penalty", "top_k", "top_p", "typical_p",
    "do_sample", "max_new_tokens", "return_full_text", "stop", "truncate", "details", "seed",
    "top_n_tokens", "best_of", "watermark", "decoder_input_details", "grammar",
]  # fmt: skip
JSON = {"content-type": "application/json"}


def body(path: str, field: str, value: str) -> str:
    """JSON by hand, for what no encoder writes."""
    if path == "/generate":
        return f'{{"inputs": "a", "parameters": {{{json.dumps(field)}: {value}}}}}'
    start = {"prompt": '"a"'}
    if path == "/v1/chat/completions":
        start = {"messages": '[{"role": "user", "content": "a"}]', "logprobs": "true"}
    fields = start | {field: value}
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in fields.items()) + "}"


CASES = [
    *(("/v1/chat/completions", field) for field in OPENAI),
    *(("/v1/completions", field) for field in OPENAI),
    *(("/generate", field) for field in NATIVE),
]


@pytest.mark.parametrize(("path", "field"), CASES)
def test_hostile_values_are_answered(
    server: LiveServer, engine: FakeEngine, path: str, field: str
) -> None:
    for value in HOSTILE:
        response = server.http.post(path, content=body(path, field, value), headers=JSON)
        assert response.status_code in (200, 400, 422), (value, response.text)
        assert response.headers["content-type"] == "application/json"
    assert server.post("/generate", {"inputs": "a"}).status_code == 200
    # what the wire cannot carry to the device never got that far
    for submit in engine.submitted:
        assert 0 <= (submit.sampling.seed or 0) < 2**64
        assert 0 <= submit.sampling.temperature <= 100


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=st.sampled_from(CASES),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=5,
    ),
)
def test_any_json_at_all_is_answered(
    server: LiveServer, case: tuple[str, str], value: object
) -> None:
    path, field = case
    sent = body(path, field, json.dumps(value)).encode("utf-8", "surrogatepass")
    response = server.http.post(path, content=sent, headers=JSON)
    assert response.status_code in (200, 400, 422), response.text


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"a"', "\xff", "[" * 100_000, "1" * 5000])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate", "/"])
def test_bodies_that_are_no_request_are_refused(server: LiveServer, path: str, text: str) -> None:
    response = server.http.post(path, content=text.encode("latin-1"), headers=JSON)
    assert response.status_code in (400, 422)
    assert "error" in response.json()


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"stop": ["a"] * 5}, 400),
        ({"stop": ["x" * 1025]}, 400),
        ({"stop": [""]}, 400),
        ({"logit_bias": {"300": 1}}, 400),
        ({"logit_bias": {"-1": 1}}, 400),
        ({"logit_bias": {str(token): 1 for token in range(65)}}, 400),
        ({"logit_bias": {str(token): 1 for token in range(64)}}, 200),
        ({"logit_bias": {"1": 101}}, 400),
        ({"prompt": [300]}, 400),
        ({"prompt": [[1], []]}, 400),
        ({"prompt": ["a"] * 5}, 400),
        ({"prompt": ""}, 400),
        ({"logprobs": 21}, 400),
        ({"max_tokens": 512}, 400),
        ({"max_tokens": 511}, 200),
        ({"prompt": "a" * 512}, 400),
        ({"prompt": "a" * 100_000}, 400),
        ({"min_tokens": 17}, 400),
        ({"top_p": 0}, 400),
        ({"top_p": 1}, 200),
        ({"temperature": 0}, 200),
        ({"stop_token_ids": [300]}, 400),
        ({"model": "m" * 257}, 400),
        ({"max_tokens": 20, "min_tokens": 21}, 400),
    ],
)
def test_limits_of_a_request(server: LiveServer, fields: dict[str, object], status: int) -> None:
    response = server.post("/v1/completions", {"prompt": "a", **fields})
    assert response.status_code == status, response.text
    if status == 400:
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"temperature": 0}, "temperature"),
        ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 600}, "`inputs` tokens + `max_new_tokens` must be <= 512"),
        ({"truncate": 512}, "truncate"),
        ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ],
)
def test_limits_of_a_native_request(
    server: LiveServer, parameters: dict[str, object], text: str
) -> None:
    response = server.post("/generate", {"inputs": "a", "parameters": parameters})
    assert response.status_code == 422
    body = response.json()
    assert body["error_type"] == "validation"
    assert body["error"].startswith("Input validation error: ")
    assert text in body["error"]


def test_a_prompt_longer_than_the_context_names_the_code_of_openai(server: LiveServer) -> None:
    response = server.post("/v1/completions", {"prompt": "a" * 600})
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "content", ['"\\ud800"', '[{"type": "text", "text": "\\ud800"}]', '[{"type": "\\ud800"}]']
)
def test_half_a_character_is_refused_wherever_it_stands(server: LiveServer, content: str) -> None:
    messages = f'{{"messages": [{{"role": "user", "content": {content}}}]}}'
    response = server.http.post("/v1/chat/completions", content=messages, headers=JSON)
    assert response.status_code == 400
    keyed = '{"prompt": "a", "logit_bias": {"\\ud800": "x"}}'
    response = server.http.post("/v1/completions", content=keyed, headers=JSON)
    assert response.status_code == 400


def test_an_error_repeats_little_of_what_was_sent(server: LiveServer) -> None:
    body = {"prompt": "a", "logit_bias": {"k" * 100_000: "x"}, "model": "m" * 100_000}
    assert len(server.post("/v1/completions", body).content) < 2000


def test_min_tokens_of_an_open_end_must_fit(server: LiveServer) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "min_tokens": 600}
    assert server.post("/v1/chat/completions", body).status_code == 400
