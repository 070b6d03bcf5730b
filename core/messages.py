"""What crosses between API and engine process, as msgspec structs over ipc:// (never pickle).

API process ── Submit, Cancel, Stop ──▶ engine process
            ◀── Progress, Ready | StartFailed, then Tokens, Rejected, Stats, Alive, Fatal ──
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..backends.options import EngineOptions, SamplingParams
from .files import ModelFiles


class EngineLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """All that the engine process is told at start; written to its standard input as JSON."""

    commands: str
    """ipc:// address that the engine pulls commands from."""
    events: str
    """ipc:// address that the engine pushes events to."""
    files: ModelFiles
    backend: str
    options: EngineOptions
    quantize: str | None = None
    """Name of the format of the weights; None: as the checkpoint says."""
    sharded: bool = False
    """Over all devices that there are, whatever options.parallel says."""
    prefix_cache: bool = True
    preempt_every: int = 0
    """Testing: preempt a running request every n steps; 0 = never."""


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request, tokenized. The engine answers with Tokens until a finish reason, or Rejected."""

    request_id: int
    prompt: list[int]
    sampling: SamplingParams
    max_new_tokens: int | None
    """None: until max_context is full."""
    min_new_tokens: int = 0
    stop_ids: list[int]
    """Ids that end the text; reported as "stop"."""
    ignore_eos: bool = False
    """stop_ids do not end the text."""
    of_drawn: bool = False
    """Logprobs of the distribution drawn from (TGI) rather than of the raw logits (OpenAI)."""
    cache_salt: str = ""
    """Part of the prefix-cache key."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """The clients of these requests are gone; their blocks are free within a step. Unknown ids are ignored."""

    request_ids: list[int]


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the engine process now."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Start-up progress; phase is "load", "warm-up" or such."""

    phase: str
    done: int
    total: int
    unit: str = ""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine serves. What /info and the start-up summary say."""

    backend: str
    device: str
    reason: str
    """Why this backend."""
    architecture: str
    dtype: str
    kv_dtype: str
    block_size: int
    num_blocks: int
    """Usable blocks of the largest KV group."""
    kv_tokens: int
    """Tokens that fit into the KV cache at once."""
    kv_bytes: int = 0
    """That they take, on each device."""
    max_context: int
    max_batch_tokens: int
    max_batch_rows: int
    max_logprobs: int
    max_logit_bias: int
    features: list[str]
    """Capabilities.features"""
    weight_bytes: int
    """Of parameters and buffers that rank 0 holds, as they lie on the device."""
    rank_weight_bytes: list[int] = []
    """The same of every rank."""
    kernels: dict[str, int] = {}
    """Linear layers by kind of weight and kernel."""
    dequantised: dict[str, int] = {}
    """Layers that the checkpoint holds packed and the device holds plain, by reason."""
    dequantised_bytes: int = 0
    """That these take more than packed, on each device."""
    reasons: dict[str, str]


class StartFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine could not start; it exits after this."""

    error: str
    """Class name."""
    message: str
    exit_code: int
    traceback: str


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One drawn token; the rest only where logprobs were asked for."""

    id: int
    logprob: float | None = None
    rank: int | None = None
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """What one step drew for one request."""

    request_id: int
    tokens: list[Token]
    finish_reason: str | None = None
    """"stop" (an id of stop_ids, which is the last of tokens), "length", or "error"."""
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache held."""
    error: str | None = None
    """With finish_reason "error": what failed, for this request alone."""


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """All that one step drew."""

    outputs: list[Tokens]


class Rejected(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The request can never be served."""

    request_id: int
    message: str


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Gauges and monotone counters, sent at most every half second and once when the engine falls idle."""

    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    """Free or only cached."""
    blocks_held: int
    """Held by running requests."""
    steps: int
    preemptions: int
    prompt_tokens: int
    """Computed, not cached."""
    generated_tokens: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Prompt tokens found there."""
    cancelled: int
    errors: int
    failed_steps: int = 0
    """Steps that raised and were repeated or cut."""
    backend: dict[str, float] = {}
    """What the backend counts itself, by name."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """The engine process runs, whatever its step takes; sent every BEAT_S."""


class Fatal(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine is about to die."""

    message: str
    traceback: str


Command = Submit | Cancel | Stop
Event = Progress | Ready | StartFailed | StepDone | Rejected | Stats | Alive | Fatal


def _encode_path(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot encode {type(value).__name__}")


def _decode_path(kind: type, value: object) -> object:
    if kind is Path:
        return Path(str(value))
    raise TypeError(f"cannot decode {kind.__name__}")


def encode_launch(launch: EngineLaunch) -> bytes:
    """One line of JSON."""
    return msgspec.json.encode(launch, enc_hook=_encode_path)


def decode_launch(line: bytes) -> EngineLaunch:
    """Raises msgspec.ValidationError."""
    return msgspec.json.decode(line, type=EngineLaunch, dec_hook=_decode_path)


encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode
