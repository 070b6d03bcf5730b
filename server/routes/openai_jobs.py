"""From OpenAI's requests to jobs."""

from __future__ import annotations

from typing import Any

from ...backends.options import SamplingParams
from ..errors import NotBuilt, WrongField
from ..job import Job
from ..schemas.openai import ChatRequest, CompletionRequest, Message, Sampling
from ..service import Model
from ..unbuilt import MESSAGE, refuse_unbuilt

SEED_MASK = 2**64 - 1
DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's; a chat without max_tokens goes on until the context is full."""
_ROLES = {"developer": "system"}
"""OpenAI's newer name for what templates call system."""
_UNBUILT_ROLES = ("tool", "function")


async def chat_job(body: ChatRequest, model: Model) -> Job:
    """Raises InvalidRequest."""
    if body.top_logprobs and not body.logprobs:
        raise WrongField("top_logprobs", "`top_logprobs` needs `logprobs` to be true")
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    messages = [_message(index, one) for index, one in enumerate(body.messages)]
    continues = body.continue_final_message
    if continues is None:
        continues = messages[-1]["role"] == "assistant"
    opens = body.add_generation_prompt
    if opens is None:
        opens = not continues
    if opens and continues:
        raise WrongField(
            "continue_final_message",
            "`continue_final_message` and `add_generation_prompt` exclude each other",
        )
    for message in messages:
        model.limits.check_text(message["content"])
    prompt = await model.generator.render(
        messages, add_generation_prompt=opens, continue_final_message=continues
    )
    most = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    # the template writes the special tokens
    return _job(body, prompt, most, num_logprobs, add_special_tokens=False)


def _message(index: int, message: Message) -> dict[str, Any]:
    where = f"messages[{index}]."
    refuse_unbuilt(message.model_extra, MESSAGE, where)
    if message.role in _UNBUILT_ROLES:
        raise NotBuilt(f"{where}role", f"the role {message.role!r} is not served yet")
    role = _ROLES.get(message.role, message.role)
    named = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": _content(where, message), **named}


def _content(where: str, message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        raise WrongField(f"{where}content", f"`{where}content` is missing")
    texts: list[str] = []
    for part in message.content:
        kind, text = part.get("type"), part.get("text")
        if kind != "text":
            raise NotBuilt(f"{where}content", f"content of type {str(kind)[:64]!r} is not served")
        if not isinstance(text, str):
            raise WrongField(f"{where}content", "a part of type text needs a string `text`")
        texts.append(text)
    return "".join(texts)


def completion_jobs(body: CompletionRequest, model: Model) -> list[Job]:
    """One a prompt, in order. Raises InvalidRequest."""
    prompt = body.prompt
    prompts: list[str | tuple[int, ...]]
    if isinstance(prompt, str):
        prompts = [prompt]
    elif isinstance(prompt[0], int):
        prompts = [tuple(one for one in prompt if isinstance(one, int))]
    else:
        prompts = [
            one if isinstance(one, str) else tuple(one)
            for one in prompt
            if not isinstance(one, int)
        ]
    most = model.limits.max_client_batch_size
    if len(prompts) > most:
        raise WrongField(
            "prompt",
            f"Number of prompts exceeds the maximum allowed batch size of {most}",
        )
    max_new = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return [_job(body, one, max_new, body.logprobs, add_special_tokens=True) for one in prompts]


def _job(
    body: Sampling,
    prompt: str | tuple[int, ...],
    max_new_tokens: int | None,
    num_logprobs: int | None,
    *,
    add_special_tokens: bool,
) -> Job:
    stop = body.stop or []
    return Job(
        prompt=prompt,
        sampling=_sampling(body, num_logprobs),
        max_new_tokens=max_new_tokens,
        min_new_tokens=body.min_tokens or 0,
        stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        add_special_tokens=add_special_tokens,
        cache_salt=body.cache_salt or "",
    )


def _sampling(body: Sampling, num_logprobs: int | None) -> SamplingParams:
    return SamplingParams(
        temperature=_given(body.temperature, DEFAULT_TEMPERATURE),
        # -1 and 0 are vLLM's words for off
        top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
        top_p=_given(body.top_p, 1.0),
        min_p=_given(body.min_p, 0.0),
        typical_p=_given(body.typical_p, 1.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        seed=None if body.seed is None else body.seed & SEED_MASK,
        logit_bias=_bias(body.logit_bias or {}),
        num_logprobs=num_logprobs,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _bias(given: dict[str, float]) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise WrongField("logit_bias", "the keys of `logit_bias` must be token ids")
        bias[int(key)] = float(value)
    return bias
