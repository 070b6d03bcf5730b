"""Use a running server as people do: with the openai client and huggingface_hub's InferenceClient.

python scripts/lib/clients.py [URL]    starts a server of the default model when no URL is given
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from huggingface_hub import InferenceClient
from openai import OpenAI
from served import served

QUESTION = "What is the capital of France? Answer in one sentence."
PROMPT = "The capital of France is"
# POST / repeats the prompt unless told otherwise, as TGI's does
OPTIONS = {"max_new_tokens": 12, "return_full_text": False}
MESSAGES = [{"role": "user", "content": QUESTION}]


def openai_chat(url: str) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
    answer = client.chat.completions.create(
        model="tgi", messages=MESSAGES, temperature=0, max_tokens=20
    )
    assert answer.usage.completion_tokens > 0
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content


def openai_chat_stream(url: str) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
    chunks = list(
        client.chat.completions.create(
            model="tgi",
            messages=MESSAGES,
            temperature=0,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage.completion_tokens > 0
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def openai_completion(url: str) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
    answer = client.completions.create(model="tgi", prompt=PROMPT, temperature=0, max_tokens=12)
    assert answer.choices[0].finish_reason == "length"
    return answer.choices[0].text


def openai_completion_stream(url: str) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
    stream = client.completions.create(
        model="tgi", prompt=PROMPT, temperature=0, max_tokens=12, stream=True
    )
    return "".join(chunk.choices[0].text for chunk in stream)


def hub_text(url: str) -> str:
    output = InferenceClient(url).text_generation(PROMPT, details=True, **OPTIONS)
    assert output.details.generated_tokens == 12
    assert output.details.finish_reason == "length"
    assert len(output.details.tokens) == 12
    return output.generated_text


def hub_text_stream(url: str) -> str:
    client = InferenceClient(url)  # a stream ends when its client is collected
    outputs = list(client.text_generation(PROMPT, details=True, stream=True, **OPTIONS))
    assert [output.index for output in outputs] == list(range(1, 13))
    assert outputs[-1].generated_text == "".join(output.token.text for output in outputs)
    return outputs[-1].generated_text


def hub_chat(url: str) -> str:
    answer = InferenceClient(url).chat_completion(MESSAGES, max_tokens=20, temperature=0)
    return answer.choices[0].message.content


def hub_chat_stream(url: str) -> str:
    client = InferenceClient(url)
    chunks = client.chat_completion(MESSAGES, max_tokens=20, temperature=0, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


CALLS: tuple[Callable[[str], str], ...] = (
    openai_chat,
    openai_chat_stream,
    openai_completion,
    openai_completion_stream,
    hub_text,
    hub_text_stream,
    hub_chat,
    hub_chat_stream,
)


def run(url: str) -> dict[str, str]:
    """What every client got. Raises where an answer is not as its protocol says."""
    answers = {call.__name__: call(url) for call in CALLS}
    chats = {answers[name] for name in answers if "chat" in name}
    texts = {answers[name] for name in answers if "chat" not in name}
    assert len(chats) == 1, f"chat answers differ: {chats}"
    assert len(texts) == 1, f"completions differ: {texts}"
    assert "Paris" in chats.pop()
    return answers


def main() -> None:
    with ExitStack() as stack:
        if len(sys.argv) > 1:
            url = sys.argv[1]
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            url = stack.enter_context(served(Path(folder) / "log.txt")).url
        for name, answer in run(url).items():
            print(f"{name:24} {answer!r}")


if __name__ == "__main__":
    main()
