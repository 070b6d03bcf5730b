"""OpenAI's /v1/chat/completions and /v1/completions: pydantic for what comes in, msgspec for what goes out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field

from .bounds import (
    Bias,
    Body,
    Count,
    Penalty,
    Positive,
    Repetition,
    Seed,
    Share,
    ShareOrNone,
    Temperature,
    Text,
    TokenId,
)

MAX_MESSAGES = 4096
MAX_LOGPROBS = 20
MAX_MODEL_CHARS = 256


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool | None = None


class Message(Body):
    """One turn. Content is text, or parts of which only text is served."""

    role: Text = Field(min_length=1, max_length=64)
    content: Text | list[dict[str, Any]] | None = None
    name: Text | None = None


class Sampling(Body):
    """What chat and completions have in common."""

    # echoed in every chunk of a stream
    model: Annotated[Text, Field(max_length=MAX_MODEL_CHARS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: ShareOrNone | None = None
    typical_p: Share | None = None
    repetition_penalty: Repetition | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: Text | Annotated[list[Text], Field(max_length=1024)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    cache_salt: Annotated[Text, Field(max_length=256)] | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


Ids = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=1024)]
IdLists = Annotated[list[Ids], Field(min_length=1, max_length=1024)]


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Text | Texts | Ids | IdLists
    max_tokens: Positive | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class PromptDetails(msgspec.Struct, frozen=True):
    """What of the prompt was not computed."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request, all its prompts together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that might have been drawn."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """A drawn token."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Of the tokens of a choice or chunk."""

    content: list[TokenLogprob]


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The model's turn."""

    role: str = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The only one."""

    index: int = 0
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(msgspec.Struct, frozen=True):
    """What a chunk adds."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The only one."""

    index: int = 0
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists over the tokens of a choice or chunk."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One prompt's; also what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class CompletionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Of POST /v1/completions; in a stream each event is one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
