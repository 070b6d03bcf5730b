"""/v1: shapes, streams, and what reaches the engine."""

import json

import httpx
import pytest

from .fakes import EOS, FakeEngine, LiveServer

ASK = [{"role": "user", "content": "hi"}]


def events(response: httpx.Response) -> list[object]:
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") for frame in frames)
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def chat(server: LiveServer, **fields: object) -> httpx.Response:
    return server.post("/v1/chat/completions", {"messages": ASK, **fields})


def test_chat_answers_in_the_shape_of_openai(server: LiveServer) -> None:
    body = chat(server, model="anything").json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "anything"
    [choice] = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "Hello world"
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    # <user>hi<assistant>
    assert body["usage"]["prompt_tokens"] == 19
    assert body["usage"]["completion_tokens"] == 12
    assert body["usage"]["total_tokens"] == 31
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


def test_a_model_that_was_not_named_is_called_by_its_name(server: LiveServer) -> None:
    assert chat(server).json()["model"] == "fake/model"


def test_a_chat_stream_adds_up_to_the_answer_and_ends_with_done(server: LiveServer) -> None:
    chunks = events(chat(server, stream=True, stream_options={"include_usage": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    *chunks, usage = chunks
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello world"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) == {None}


def test_a_stream_without_include_usage_has_no_usage_chunk(server: LiveServer) -> None:
    assert all(chunk["choices"] for chunk in events(chat(server, stream=True)))


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_of_new_tokens_ends_by_length(server: LiveServer, name: str) -> None:
    [choice] = chat(server, **{name: 5}).json()["choices"]
    assert choice["message"]["content"] == "Hello"
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("stop", ["o w", ["zzz", "o w"]])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_stripped_and_ends_the_request(
    server: LiveServer, engine: FakeEngine, stop: object, stream: bool
) -> None:
    response = chat(server, stop=stop, stream=stream)
    if stream:
        chunks = events(response)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        [choice] = response.json()["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == ("Hell", "stop")
    assert engine.cancelled == [engine.submitted[0].request_id]


def test_multibyte_characters_are_never_cut(server: LiveServer, engine: FakeEngine) -> None:
    engine.reply = "naïve 東京 🎉"
    chunks = events(chat(server, stream=True))
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "naïve 東京 🎉"


def test_a_character_that_is_cut_by_the_limit_is_flushed(
    server: LiveServer, engine: FakeEngine
) -> None:
    engine.reply = "a東"
    assert chat(server, max_tokens=2).json()["choices"][0]["message"]["content"] == "a\ufffd"


def test_a_stop_string_before_min_tokens_does_not_stop(
    server: LiveServer, engine: FakeEngine
) -> None:
    engine.reply = "ababab"
    [choice] = chat(server, stop="b", min_tokens=3).json()["choices"]
    assert choice["message"]["content"] == "aba"


def test_logprobs_of_a_chat_name_the_drawn_token_and_the_best(server: LiveServer) -> None:
    [choice] = chat(server, logprobs=True, top_logprobs=2, max_tokens=1).json()["choices"]
    [entry] = choice["logprobs"]["content"]
    assert entry["token"] == "H"
    assert entry["bytes"] == [72]
    assert entry["logprob"] == -0.5
    assert [top["token"] for top in entry["top_logprobs"]] == ["H", "A"]


def test_a_chat_samples_at_temperature_one_unless_told_otherwise(
    server: LiveServer, engine: FakeEngine
) -> None:
    chat(server)
    assert engine.sampling.temperature == 1.0
    chat(server, temperature=0)
    assert engine.sampling.temperature == 0.0


def test_every_sampling_field_reaches_the_engine(server: LiveServer, engine: FakeEngine) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "typical_p": 0.8,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.4,
    }
    chat(
        server,
        **fields,
        seed=-1,
        logit_bias={"5": 2.5},
        min_tokens=3,
        max_tokens=9,
        stop_token_ids=[7],
        cache_salt="mine",
    )
    sampling = engine.sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.seed == 2**64 - 1
    assert sampling.logit_bias == {5: 2.5}
    submit = engine.submitted[-1]
    assert (submit.min_new_tokens, submit.max_new_tokens) == (3, 9)
    assert submit.stop_ids == [7, EOS]
    assert submit.cache_salt == "mine"
    assert submit.of_drawn is False


def test_ignore_eos_leaves_the_named_ids_in_force(server: LiveServer, engine: FakeEngine) -> None:
    chat(server, ignore_eos=True)
    assert engine.submitted[-1].ignore_eos is True
    body = chat(server, ignore_eos=True, stop_token_ids=[ord("w")]).json()
    assert engine.submitted[-1].stop_ids == [ord("w")]
    assert engine.submitted[-1].ignore_eos is False
    # the id that ends the text is no part of it
    assert body["choices"][0]["message"]["content"] == "Hello "


def test_an_assistant_turn_at_the_end_is_continued(server: LiveServer, engine: FakeEngine) -> None:
    messages = [*ASK, {"role": "assistant", "content": "Well"}]
    assert server.post("/v1/chat/completions", {"messages": messages}).status_code == 200
    assert bytes(engine.submitted[-1].prompt) == b"<user>hi<assistant>Well"


def test_text_parts_are_joined_and_developer_is_system(
    server: LiveServer, engine: FakeEngine
) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}]
    server.post("/v1/chat/completions", {"messages": messages})
    assert bytes(engine.submitted[-1].prompt) == b"<system>ab<assistant>"


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]])
def test_a_completion_takes_text_and_ids(
    server: LiveServer, engine: FakeEngine, prompt: object
) -> None:
    body = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 5}).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "length"}
    ]
    assert engine.submitted[-1].prompt == [97, 98, 99]


def test_a_completion_draws_sixteen_tokens_unless_told_otherwise(
    server: LiveServer, engine: FakeEngine
) -> None:
    engine.reply = "x" * 50
    body = server.post("/v1/completions", {"prompt": "a"}).json()
    assert body["usage"]["completion_tokens"] == 16


def test_several_prompts_are_several_choices(server: LiveServer) -> None:
    body = server.post("/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": 2}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["text"] for choice in body["choices"]] == ["He"] * 3
    assert body["usage"]["completion_tokens"] == 6


def test_several_prompts_stream_side_by_side(server: LiveServer) -> None:
    body = {"prompt": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage = events(server.post("/v1/completions", body))
    texts = ["", ""]
    reasons: list[object] = [None, None]
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == ["Hello world"] * 2
    assert reasons == ["stop"] * 2
    assert usage["usage"]["completion_tokens"] == 24


def test_logprobs_of_a_completion_are_parallel_lists(server: LiveServer) -> None:
    body = {"prompt": "a", "max_tokens": 2, "logprobs": 2}
    [choice] = server.post("/v1/completions", body).json()["choices"]
    assert choice["logprobs"] == {
        "tokens": ["H", "e"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"H": -0.5, "A": -1.5}, {"e": -0.5, "A": -1.5}],
        "text_offset": [0, 1],
    }


def test_models_lists_the_one_that_is_served(server: LiveServer) -> None:
    body = server.get("/v1/models").json()
    assert body["object"] == "list"
    [card] = body["data"]
    assert card["id"] == card["owned_by"] == "fake/model"
    assert card["max_model_len"] == 512
