"""The official clients against the app: the openai package and huggingface_hub's InferenceClient."""

import huggingface_hub
import openai
import pytest
from huggingface_hub.errors import GenerationError, OverloadedError, ValidationError

from chipset.core.errors import RequestFailed

from .fakes import FakeEngine, LiveServer, live_server

ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture
def official(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def inference(server: LiveServer) -> huggingface_hub.InferenceClient:
    return huggingface_hub.InferenceClient(server.url)


def test_openai_chat(official: openai.OpenAI) -> None:
    answer = official.chat.completions.create(
        model="any", messages=ASK, logprobs=True, top_logprobs=2, max_completion_tokens=5
    )
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "H"
    assert answer.usage.completion_tokens == 5


def test_openai_chat_streamed(official: openai.OpenAI) -> None:
    stream = official.chat.completions.create(
        model="any", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hello world"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 12


def test_openai_completions(official: openai.OpenAI) -> None:
    answer = official.completions.create(model="any", prompt=["a", "b"], logprobs=1)
    assert [choice.text for choice in answer.choices] == ["Hello world"] * 2
    stream = official.completions.create(model="any", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello world"


def test_openai_models(official: openai.OpenAI) -> None:
    assert [model.id for model in official.models.list()] == ["fake/model"]


def test_openai_errors(official: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError, match="is not served yet"):
        official.chat.completions.create(
            model="any", messages=ASK, response_format={"type": "json_object"}
        )
    engine.failure = RequestFailed("a step failed")
    with pytest.raises(openai.InternalServerError):
        official.chat.completions.create(model="any", messages=ASK)
    with pytest.raises(openai.APIError):
        list(official.chat.completions.create(model="any", messages=ASK, stream=True))


def test_openai_does_not_repeat_a_request_that_failed_for_good(
    server: LiveServer, engine: FakeEngine
) -> None:
    engine.failure = RequestFailed("a step failed")
    patient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=3)
    with pytest.raises(openai.InternalServerError):
        patient.chat.completions.create(model="any", messages=ASK)
    assert len(engine.submitted) == 1


def test_openai_waits_out_an_overload() -> None:
    engine = FakeEngine("x" * 20, delay_s=0.02)
    with live_server(engine, max_concurrent_requests=1) as server:
        patient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5)
        stream = patient.completions.create(model="any", prompt="a", stream=True, max_tokens=20)
        next(stream)
        with pytest.raises(openai.RateLimitError):
            patient.with_options(max_retries=0).completions.create(model="any", prompt="a")
        assert "".join(chunk.choices[0].text for chunk in stream) == "x" * 19
        assert patient.completions.create(model="any", prompt="a").choices[0].text == "x" * 16


def test_hub_text_generation(inference: huggingface_hub.InferenceClient) -> None:
    assert inference.text_generation("hi", return_full_text=False) == "Hello world"
    detailed = inference.text_generation(
        "hi", details=True, return_full_text=False, max_new_tokens=5, top_n_tokens=2
    )
    assert detailed.generated_text == "Hello"
    assert detailed.details.finish_reason == "length"
    assert [token.text for token in detailed.details.tokens] == list("Hello")
    assert len(detailed.details.top_tokens[0]) == 2


def test_hub_text_generation_streamed(inference: huggingface_hub.InferenceClient) -> None:
    # this client shows special tokens, as it does of TGI
    assert "".join(inference.text_generation("hi", stream=True)) == "Hello world</s>"
    events = list(inference.text_generation("hi", stream=True, details=True))
    assert events[-1].details.generated_tokens == 12
    assert events[-1].details.finish_reason == "eos_token"


def test_hub_chat(inference: huggingface_hub.InferenceClient) -> None:
    answer = inference.chat_completion(ASK)
    assert answer.choices[0].message.content == "Hello world"
    chunks = list(inference.chat_completion(ASK, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hello world"


def test_hub_info_and_health(server: LiveServer) -> None:
    client = huggingface_hub.InferenceClient(provider="hf-inference")
    assert client.get_endpoint_info(model=server.url)["model_id"] == "fake/model"
    assert client.health_check(model=server.url) is True


def test_hub_errors(inference: huggingface_hub.InferenceClient, engine: FakeEngine) -> None:
    with pytest.raises(ValidationError, match="truncate"):
        inference.text_generation("hi", truncate=10_000)
    with pytest.raises(ValidationError, match="adapter_id"):
        list(inference.text_generation("hi", adapter_id="x", stream=True))
    engine.failure = RequestFailed("a step failed")
    with pytest.raises(GenerationError):
        inference.text_generation("hi")
    with live_server(FakeEngine(), max_concurrent_requests=1) as full:
        full.service.admit()
        with pytest.raises(OverloadedError):
            huggingface_hub.InferenceClient(full.url).text_generation("hi")
