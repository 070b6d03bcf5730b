"""ServerSettings: each field is at once a flag, an environment variable, a default, a bound and a line of help."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

from ..backends.options import BACKENDS, EngineOptions, ParallelOptions
from ..core.quantization.names import QUANTIZE_NAMES

T = TypeVar("T")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
MAX_COUNT = 2**31 - 1
MAX_TEMPERATURE = 100.0
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES: Mapping[str, str] = {
    **{name: name for name in DTYPES},
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "int8": "int8",
}
"""As the flag takes them, in TGI's words, and as torch does."""
KV_ALIASES: Mapping[str, str] = {
    "fp8_e4m3": "float8_e4m3fn",
    **{name: name for name in KV_DTYPES.values()},
}
"""What it takes beside: errors of backends name dtypes as torch does."""


def whole_number(low: int, high: int = MAX_COUNT) -> Callable[[str], int]:
    """A parser of whole numbers from `low` to `high`; it raises ValueError with the bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return parse


def seconds(text: str) -> float:
    """A finite number of seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("a number of seconds, 0 or more")
    return value


def not_empty(text: str) -> str:
    """Any text but none."""
    if not text.strip():
        raise ValueError("a text that is not empty")
    return text


def temperature(text: str) -> float:
    """A finite temperature; 0 is greedy."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_TEMPERATURE:
        raise ValueError(f"a number from 0 to {MAX_TEMPERATURE:g}")
    return value


def fraction(text: str) -> float:
    """A share above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError("a number above 0 and at most 1")
    return value


def size(text: str) -> int:
    """Bytes: 1048576, 512MiB, 2GiB, 1.5GB."""
    match = _SIZE.fullmatch(text.strip())
    number = 0
    if match:
        amount, unit, binary = match.groups()
        base = 1024 if binary else 1000
        number = int(float(amount) * base ** _POWERS[unit.lower()])
    if number <= 0:
        raise ValueError("a size in bytes such as 512MiB or 2GiB")
    return number


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser of names; it raises ValueError with the choices."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return text

    return parse


def kv_dtype(text: str) -> str:
    """Torch's name of a dtype that a KV cache may have."""
    found = KV_DTYPES.get(text) or KV_ALIASES.get(text)
    if found is None:
        raise ValueError("one of " + ", ".join(KV_DTYPES))
    return found


def on(text: str) -> bool:
    """A switch's environment variable: 1, true, yes, on or their opposites."""
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("", "0", "false", "no", "off"):
        return False
    raise ValueError("true or false")


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag(Generic[T]):
    """How a field of ServerSettings is set from outside."""

    names: tuple[str, ...]
    """The long name first, then its aliases."""
    parse: Callable[[str], T]
    """Raises ValueError that says what is wanted."""
    help: str
    metavar: str | None = None
    """None: a switch."""
    default: Any = None

    @property
    def variable(self) -> str:
        """CHIPSET_ and the long name in upper case."""
        return "CHIPSET_" + self.names[0].removeprefix("--").replace("-", "_").upper()


def _flag(
    *names: str,
    parse: Callable[[str], Any] = str,
    default: Any = None,
    metavar: str | None = None,
    help: str,  # noqa: A002 - argparse's own word
) -> Any:
    flag: Flag[Any] = Flag(names=names, parse=parse, help=help, metavar=metavar, default=default)
    return field(default=default, metadata={"flag": flag})


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """What the operator set. None is left to the model and the backend."""

    model: str | None = _flag(
        "--model-id",
        metavar="MODEL",
        help="hub id, folder, .gguf file or pypi:PACKAGE==VERSION/FILE",
    )
    revision: str | None = _flag(
        "--revision", metavar="NAME", help="branch, tag or commit of a hub model"
    )
    host: str = _flag(
        "--host", "--hostname", metavar="ADDRESS", default="127.0.0.1", help="address to listen on"
    )
    port: int = _flag(
        "--port", "-p", parse=whole_number(0, 65535), metavar="N", default=8080,
        help="port to listen on; 0 takes any free one",
    )  # fmt: skip
    backend: str = _flag(
        "--backend", metavar="NAME", default="auto",
        help=f"auto, {', '.join(BACKENDS)}, or an installed plugin's name",
    )  # fmt: skip
    dtype: str = _flag(
        "--dtype", parse=one_of(*DTYPES), metavar="NAME", default="auto",
        help="of weights and activations: " + ", ".join(DTYPES),
    )  # fmt: skip
    kv_cache_dtype: str = _flag(
        "--kv-cache-dtype", parse=kv_dtype, metavar="NAME", default="auto",
        help="of the KV cache: " + ", ".join(KV_DTYPES) + "; auto is the model's",
    )  # fmt: skip
    quantize: str | None = _flag(
        "--quantize", parse=not_empty, metavar="NAME",
        help=f"how weights are packed: {', '.join(QUANTIZE_NAMES)} or a plugin's; default: as the checkpoint says",
    )  # fmt: skip
    num_shard: int | None = _flag(
        "--num-shard", "--tensor-parallel-size", parse=whole_number(1, 4096), metavar="N",
        help="devices that share the model; default: 1",
    )  # fmt: skip
    sharded: bool | None = _flag(
        "--sharded", parse=on, metavar="BOOL",
        help="true: over all devices that the backend finds, or --num-shard of them; false: on one",
    )  # fmt: skip
    block_size: int | None = _flag(
        "--block-size", parse=whole_number(1, 4096), metavar="N", help="tokens in a KV block"
    )
    max_total_tokens: int | None = _flag(
        "--max-total-tokens", "--max-model-len", parse=whole_number(2), metavar="N",
        help="prompt and generated tokens of one request; default: what fits",
    )  # fmt: skip
    max_input_tokens: int | None = _flag(
        "--max-input-tokens", parse=whole_number(1), metavar="N",
        help="tokens of one prompt; default: one less than --max-total-tokens",
    )  # fmt: skip
    max_batch_prefill_tokens: int | None = _flag(
        "--max-batch-prefill-tokens", parse=whole_number(1), metavar="N", help="tokens of one step"
    )
    max_batch_size: int | None = _flag(
        "--max-batch-size", parse=whole_number(1, 65536), metavar="N", help="requests in one step"
    )
    max_concurrent_requests: int = _flag(
        "--max-concurrent-requests", parse=whole_number(1), metavar="N", default=128,
        help="requests running and waiting; more are answered 429",
    )  # fmt: skip
    max_stop_sequences: int = _flag(
        "--max-stop-sequences", parse=whole_number(0, 1024), metavar="N", default=4,
        help="stop strings of one request",
    )  # fmt: skip
    max_top_n_tokens: int = _flag(
        "--max-top-n-tokens", parse=whole_number(0, 1024), metavar="N", default=5,
        help="top_n_tokens of one request",
    )  # fmt: skip
    max_client_batch_size: int = _flag(
        "--max-client-batch-size", parse=whole_number(1, 1024), metavar="N", default=4,
        help="prompts of one request",
    )  # fmt: skip
    payload_limit: int = _flag(
        "--payload-limit", parse=size, metavar="SIZE", default=2_000_000, help="bytes of one body"
    )
    kv_cache_memory: int | None = _flag(
        "--kv-cache-memory", parse=size, metavar="SIZE", help="for the KV cache, such as 2GiB"
    )
    memory_utilisation: float = _flag(
        "--memory-utilisation", "--memory-utilization", parse=fraction, metavar="SHARE", default=0.9,
        help="share of the device's memory to use",
    )  # fmt: skip
    no_prefix_cache: bool = _flag(
        "--no-prefix-cache", parse=on, default=False, help="compute every prompt anew"
    )
    api_key: str | None = _flag(
        "--api-key",
        parse=not_empty,
        metavar="KEY",
        help="wanted by every route except /health and /ready",
    )
    public_metrics: bool = _flag(
        "--public-metrics", parse=on, default=False, help="serve /metrics without the key"
    )
    shutdown_timeout: float = _flag(
        "--shutdown-timeout", parse=seconds, metavar="SECONDS", default=2.0,
        help="that running requests have to finish after SIGTERM",
    )  # fmt: skip
    max_restarts: int = _flag(
        "--max-restarts", parse=whole_number(0), metavar="N", default=5,
        help="of an engine that ends unasked, within 5 minutes; one more ends the server",
    )  # fmt: skip
    log_level: str = _flag(
        "--log-level", parse=one_of("debug", "info", "warning", "error"), metavar="LEVEL",
        default="warning", help="debug, info, warning or error",
    )  # fmt: skip
    debug_preempt_every: int = _flag(
        "--debug-preempt-every", parse=whole_number(0), metavar="N", default=0,
        help="put a running request back every N steps, to see that no text changes; 0: never",
    )  # fmt: skip
    debug: bool = _flag("--debug", parse=on, default=False, help="show tracebacks")

    @property
    def engine_options(self) -> EngineOptions:
        """The part that is the engine's."""
        return EngineOptions(
            dtype=self.dtype,
            kv_dtype=self.kv_cache_dtype,
            block_size=self.block_size,
            max_context=self.max_total_tokens,
            max_batch_tokens=self.max_batch_prefill_tokens,
            max_batch_rows=self.max_batch_size,
            kv_bytes=self.kv_cache_memory,
            memory_utilisation=self.memory_utilisation,
            parallel=ParallelOptions(tensor=self.num_shard or 1),
        )


def flags() -> Iterator[tuple[str, Flag[Any]]]:
    """(field name, its flag) of ServerSettings, in order."""
    for one in fields(ServerSettings):
        yield one.name, one.metadata["flag"]


def build_settings(
    given: Mapping[str, str | bool], environment: Mapping[str, str] = os.environ
) -> ServerSettings:
    """Flag before environment variable before default. Raises ValueError: one line with the cure."""
    values: dict[str, Any] = {}
    for name, flag in flags():
        if name in given:
            origin, value = flag.names[0], given[name]
        elif environment.get(flag.variable, "") != "":
            origin, value = flag.variable, environment[flag.variable]
        else:
            continue
        if isinstance(value, bool):
            values[name] = value
            continue
        try:
            values[name] = flag.parse(value)
        except ValueError as error:
            shown = "" if name == "api_key" else f" not {value!r};"
            raise ValueError(f"{origin}:{shown} give {error}") from None
    settings = ServerSettings(**values)
    _check_shards(settings)
    return settings


def _check_shards(settings: ServerSettings) -> None:
    """Raises ValueError where --sharded and --num-shard say different things."""
    number, sharded = settings.num_shard, settings.sharded
    if sharded is not None and number is not None and sharded != (number > 1):
        told = str(sharded).lower()
        raise ValueError(f"--sharded {told} and --num-shard {number} disagree; give one of them")
