"""The native dialect: shapes, streams, and what reaches the engine."""

import json

import httpx
import pytest

from .fakes import FakeEngine, LiveServer, live_server


def events(response: httpx.Response) -> list[dict[str, object]]:
    assert response.status_code == 200
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: {") for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def generate(server: LiveServer, **parameters: object) -> httpx.Response:
    return server.post("/generate", {"inputs": "hi", "parameters": parameters})


def test_generate_answers_the_text_alone_unless_details_are_wanted(server: LiveServer) -> None:
    assert generate(server).json() == {"generated_text": "Hello world"}


def test_details_hold_every_token_and_the_end(server: LiveServer) -> None:
    body = generate(server, details=True).json()
    assert list(body) == ["generated_text", "details"]
    details = body["details"]
    assert details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == 12
    assert details["seed"] is None
    assert details["prefill"] == []
    assert details["tokens"][0] == {"id": 72, "text": "H", "logprob": -0.5, "special": False}
    assert details["tokens"][-1] == {"id": 256, "text": "</s>", "logprob": -0.5, "special": True}
    assert "top_tokens" not in details
    assert "best_of_sequences" not in details


def test_top_tokens_are_there_when_asked_for(server: LiveServer) -> None:
    details = generate(server, details=True, top_n_tokens=2, max_new_tokens=1).json()["details"]
    assert [[token["text"] for token in tops] for tops in details["top_tokens"]] == [["H", "A"]]


def test_an_end_of_text_on_the_last_token_allowed_is_a_length(server: LiveServer) -> None:
    body = generate(server, details=True, max_new_tokens=12).json()
    assert body["details"]["finish_reason"] == "length"


def test_a_stop_string_stays_in_the_text(server: LiveServer) -> None:
    body = generate(server, stop=["o w"], details=True).json()
    assert body["generated_text"] == "Hello w"
    assert body["details"]["finish_reason"] == "stop_sequence"


def test_a_stream_has_an_event_a_token_and_the_text_in_the_last(server: LiveServer) -> None:
    body = {"inputs": "hi", "parameters": {"details": True}}
    got = events(server.post("/generate_stream", body))
    assert [event["index"] for event in got] == list(range(1, 13))
    assert "".join(event["token"]["text"] for event in got) == "Hello world</s>"
    assert all(event["generated_text"] is None and event["details"] is None for event in got[:-1])
    assert got[-1]["generated_text"] == "Hello world"
    assert got[-1]["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 12,
        "seed": None,
        "input_length": 2,
    }


def test_the_root_answers_a_list_with_the_prompt_in_front(server: LiveServer) -> None:
    assert server.post("/", {"inputs": "hi "}).json() == [{"generated_text": "hi Hello world"}]
    body = {"inputs": "hi ", "parameters": {"return_full_text": False}}
    assert server.post("/", body).json() == [{"generated_text": "Hello world"}]


def test_the_root_streams_when_asked_to(server: LiveServer) -> None:
    got = events(server.post("/", {"inputs": "hi ", "stream": True}))
    assert got[-1]["generated_text"] == "hi Hello world"


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        (None, 1.0),
        ({}, 0.0),
        ({"temperature": 1.0}, 0.0),
        ({"temperature": 0.5}, 0.5),
        ({"do_sample": True}, 1.0),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"top_p": 1.0}, 0.0),
        ({"typical_p": 0.9}, 1.0),
    ],
)
def test_it_samples_when_tgi_would(
    server: LiveServer, engine: FakeEngine, parameters: object, temperature: float
) -> None:
    body = {"inputs": "hi"} if parameters is None else {"inputs": "hi", "parameters": parameters}
    assert server.post("/generate", body).status_code == 200
    assert engine.sampling.temperature == temperature
    assert (engine.sampling.seed is not None) == (temperature > 0)
    assert engine.submitted[-1].of_drawn is True


def test_the_seed_that_was_drawn_is_told(server: LiveServer, engine: FakeEngine) -> None:
    body = generate(server, details=True, do_sample=True).json()
    assert body["details"]["seed"] == engine.sampling.seed
    assert generate(server, details=True, do_sample=True, seed=7).json()["details"]["seed"] == 7


def test_truncate_keeps_the_end_of_the_prompt(server: LiveServer, engine: FakeEngine) -> None:
    server.post("/generate", {"inputs": "abcdef", "parameters": {"truncate": 2}})
    assert bytes(engine.submitted[-1].prompt) == b"ef"


def test_only_the_first_1024_new_tokens_count_against_the_context() -> None:
    with live_server(FakeEngine(max_context=2000)) as server:
        assert generate(server, max_new_tokens=100_000).status_code == 200


def test_nulls_are_no_use_of_a_field(server: LiveServer) -> None:
    names = (
        "best_of temperature repetition_penalty frequency_penalty top_k top_p typical_p do_sample "
        "max_new_tokens return_full_text stop truncate watermark details decoder_input_details "
        "seed top_n_tokens grammar adapter_id"
    )
    assert generate(server, **dict.fromkeys(names.split())).status_code == 200


def test_figures_of_the_request_are_in_its_headers(server: LiveServer) -> None:
    headers = generate(server).headers
    assert headers["x-compute-type"] == "1-cpu"
    assert headers["x-compute-characters"] == "2"
    assert headers["x-prompt-tokens"] == "2"
    assert headers["x-generated-tokens"] == "12"
    for name in ("x-total-time", "x-validation-time", "x-inference-time", "x-time-per-token"):
        assert int(headers[name]) >= 0


def test_without_logprobs_a_stream_has_none_and_top_tokens_are_refused() -> None:
    with live_server(FakeEngine(features=["sampled", "filters"])) as server:
        got = events(server.post("/generate_stream", {"inputs": "hi", "parameters": {}}))
        assert got[0]["token"]["logprob"] is None
        response = generate(server, details=True, top_n_tokens=1)
        assert response.status_code == 422
        assert "logprobs" in response.json()["error"]
