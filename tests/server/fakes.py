"""An engine that answers from a script, a tokenizer of bytes, and a real HTTP server around them."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path

import httpx

from chipset.backends.options import SamplingParams
from chipset.core.errors import InvalidRequest, TemplateError
from chipset.core.files import ModelFiles
from chipset.core.messages import Ready, Stats, Submit, Token, Tokens
from chipset.server.listener import listen
from chipset.server.service import Service
from chipset.server.serving import http_server
from chipset.server.settings import ServerSettings

EOS = 256
VOCAB = 300
FEATURES = ("sampled", "filters", "penalties", "bias", "logprobs")

FILES = ModelFiles(
    source="fake/model",
    name="fake/model",
    revision="0123abcd",
    config=Path("config.json"),
    tokenizer=Path("tokenizer.json"),
    tokenizer_config=None,
    chat_template=None,
    generation_config=None,
    weights=(Path("model.safetensors"),),
)


def ready(**changes: object) -> Ready:
    fields = {
        "backend": "cpu",
        "device": "fake cpu",
        "reason": "asked for",
        "architecture": "FakeForCausalLM",
        "dtype": "float32",
        "kv_dtype": "float32",
        "block_size": 16,
        "num_blocks": 100,
        "kv_tokens": 1600,
        "max_context": 512,
        "max_batch_tokens": 256,
        "max_batch_rows": 8,
        "max_logprobs": 20,
        "max_logit_bias": 64,
        "features": list(FEATURES),
        "weight_bytes": 1000,
        "reasons": {},
    }
    return Ready(**(fields | changes))


def stats(**changes: int) -> Stats:
    names = (
        "running waiting blocks_total blocks_free blocks_held steps preemptions prompt_tokens "
        "generated_tokens prefix_queries prefix_hits cancelled errors"
    )
    return Stats(**(dict.fromkeys(names.split(), 0) | changes))


class FakeTemplate:
    def render(
        self,
        messages: Sequence[dict[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **_: object,
    ) -> str:
        if any(message["role"] == "martian" for message in messages):
            raise TemplateError("no template for martians")
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return text + "<assistant>" if add_generation_prompt else text


class FakeDetokenizer:
    def __init__(self) -> None:
        self._bytes = b""

    def push(self, token_id: int) -> str:
        if token_id >= EOS:
            return ""
        self._bytes += bytes([token_id])
        try:
            text = self._bytes.decode()
        except UnicodeDecodeError:
            return ""
        self._bytes = b""
        return text

    def flush(self) -> str:
        text, self._bytes = self._bytes.decode("utf-8", "replace"), b""
        return text


class FakeTokenizer:
    """An id a byte; 256 ends the text."""

    vocab_size = VOCAB
    eos_ids = (EOS,)

    def __init__(self) -> None:
        self.chat_template: FakeTemplate | None = FakeTemplate()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        try:
            return list(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest("no Unicode") from error

    def is_special(self, token_id: int) -> bool:
        return token_id >= EOS

    def token_text(self, token_id: int) -> str:
        return "</s>" if token_id >= EOS else chr(token_id)

    def detokenizer(self, *, prompt: Sequence[int] = ()) -> FakeDetokenizer:
        return FakeDetokenizer()


class FakeEngine:
    """Draws `reply` and then the end of the text, whatever is asked."""

    def __init__(self, reply: str = "Hello world", delay_s: float = 0.0, **changes: object) -> None:
        self.ready = ready(**changes)
        self.reset(reply, delay_s)

    def reset(self, reply: str = "Hello world", delay_s: float = 0.0) -> None:
        self.reply = reply
        self.delay_s = delay_s
        self.stats: Stats | None = None
        self.submitted: list[Submit] = []
        self.cancelled: list[int] = []
        self.failure: Exception | None = None
        """Raised after the first token."""

    @property
    def sampling(self) -> SamplingParams:
        return self.submitted[-1].sampling

    async def generate(self, submit: Submit) -> AsyncGenerator[Tokens, None]:
        self.submitted.append(submit)
        finished = False
        try:
            drawn = [*self.reply.encode(), EOS]
            for count, token_id in enumerate(drawn, 1):
                await asyncio.sleep(self.delay_s)
                reason = None
                if token_id in submit.stop_ids and not submit.ignore_eos:
                    reason = "stop"
                elif count in (submit.max_new_tokens, len(drawn)):
                    reason = "length"
                token = _token(token_id, submit.sampling.num_logprobs)
                finished = reason is not None
                yield Tokens(submit.request_id, [token], reason, cached_tokens=2)
                if finished:
                    return
                if self.failure is not None:
                    raise self.failure
        finally:
            if not finished:
                self.cancelled.append(submit.request_id)


def _token(token_id: int, num_logprobs: int | None) -> Token:
    if num_logprobs is None:
        return Token(token_id)
    best = [token_id, *(id_ for id_ in range(65, 90) if id_ != token_id)][:num_logprobs]
    return Token(token_id, -0.5, 1, best, [-0.5 - index for index in range(len(best))])


class LiveServer:
    """A server on loopback in a thread of its own."""

    def __init__(self, service: Service, url: str, client: httpx.Client) -> None:
        self.service = service
        self.url = url
        self.http = client

    def post(self, path: str, body: object, **options: object) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def get(self, path: str, **options: object) -> httpx.Response:
        return self.http.get(path, **options)


@contextlib.contextmanager
def live_server(engine: FakeEngine | None, **settings: object) -> Iterator[LiveServer]:
    """`engine` None: the model is still being loaded."""
    service = Service(ServerSettings(**{"host": "127.0.0.1", **settings}))
    if engine is not None:
        service.open(FILES, engine, FakeTokenizer(), created=1)
    server = http_server(service)
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        with httpx.Client(base_url=url, timeout=20, trust_env=False) as client:
            yield LiveServer(service, url, client)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()
