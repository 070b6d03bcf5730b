"""What crosses between the engine and its workers: msgpack of closed types, arrays as their raw bytes.

engine ── WorkerLaunch, then Budget, Allocate, RunStep, … ──▶ every worker
       ◀── Loaded | StartFailed, then for each an Answer, Drawn or StepFailed; Progress and Beat at any time ──
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...backends.capabilities import Capabilities
from ...backends.options import ModelSpec, ResolvedOptions
from ...backends.plugin import Launch, Plugin, WorkerSpec
from ...backends.runtime import ErrorClass
from ...backends.step import F32, I32, StepBatch, StepOutput
from ..files import ModelFiles
from ..messages import Progress, StartFailed
from ..models.report import WeightReport
from .executor import Reset

Array = NDArray[Any]
"""Of any dtype that crosses."""
DTYPES = frozenset({"<i4", "<f4", "|b1"})
"""int32, float32, bool."""


class WorkerLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """A Launch as data, and what is to be loaded; the shapes are asked anew of the plugin, which is pure."""

    plugin: str
    worker: WorkerSpec
    world_size: int
    rendezvous: str
    groups: dict[str, tuple[int, ...]]
    capabilities: Capabilities
    options: ResolvedOptions
    model: ModelSpec
    cache_dir: str | None
    files: ModelFiles
    quantize: str | None

    @classmethod
    def of(cls, launch: Launch, files: ModelFiles, quantize: str | None) -> WorkerLaunch:
        """What the worker of `launch` is told."""
        shared = set(cls.__struct_fields__) - {"files", "quantize", "groups"}
        return cls(
            files=files,
            quantize=quantize,
            groups=dict(launch.groups),
            **{name: getattr(launch, name) for name in shared},
        )

    def launch(self, plugin: Plugin) -> Launch:
        """The Launch again."""
        shared = set(self.__struct_fields__) - {"files", "quantize"}
        return Launch(
            shapes=plugin.shapes(self.options, self.model),
            **{name: getattr(self, name) for name in shared},
        )


class Budget(msgspec.Struct, frozen=True, tag=True):
    """Executor.budget"""


class BlockBytes(msgspec.Struct, frozen=True, tag=True):
    """Executor.block_bytes"""


class Allocate(msgspec.Struct, frozen=True, tag=True):
    """Executor.allocate"""

    num_blocks: list[int]


class WarmUp(msgspec.Struct, frozen=True, tag=True):
    """Executor.warm_up"""

    num_blocks: int


class RunStep(msgspec.Struct, frozen=True, tag=True):
    """Executor.step"""

    batch: StepBatch
    resets: list[Reset]


class ReplaceLostCache(msgspec.Struct, frozen=True, tag=True):
    """Executor.replace_lost_cache"""


class Counters(msgspec.Struct, frozen=True, tag=True):
    """Executor.counters"""


class Close(msgspec.Struct, frozen=True, tag=True):
    """Executor.close; the worker ends."""


Order = Budget | BlockBytes | Allocate | WarmUp | RunStep | ReplaceLostCache | Counters | Close


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The worker has its part of the model."""

    weights: WeightReport


class Answer(msgspec.Struct, frozen=True, tag=True):
    """An order was carried out."""

    value: bool | int | list[int] | dict[str, float] | None = None


class Drawn(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A step drew: the fields of StepOutput."""

    ids: I32
    finite: Array
    logprob: F32 | None = None
    rank: I32 | None = None
    top_ids: I32 | None = None
    top_logprobs: F32 | None = None

    @classmethod
    def of(cls, output: StepOutput) -> Drawn:
        """From what was fetched."""
        fields: dict[str, Any] = {name: getattr(output, name) for name in cls.__struct_fields__}
        return cls(**fields)

    def output(self) -> StepOutput:
        """As if it had been fetched here."""
        return StepOutput(**msgspec.structs.asdict(self))


class StepFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A step raised."""

    kind: ErrorClass
    """By Runtime.classify."""
    error: str
    message: str
    traceback: str


class Beat(msgspec.Struct, frozen=True, tag=True):
    """The worker's process runs, whatever its step takes."""


Message = Loaded | StartFailed | Answer | Drawn | StepFailed | Progress | Beat


def _encode_other(value: object) -> object:
    if isinstance(value, np.ndarray):
        if value.dtype.str not in DTYPES:
            raise TypeError(f"an array of {value.dtype} does not cross")
        return value.dtype.str, value.shape, np.ascontiguousarray(value).data
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot encode {type(value).__name__}")


def _decode_other(kind: Any, value: object) -> object:
    """Raises ValueError, which msgspec hands on as its ValidationError, where `value` is no array of `kind`."""
    if kind is Path:
        return Path(str(value))
    dtype, shape, data = msgspec.convert(value, tuple[str, tuple[int, ...], bytes], strict=True)
    wanted = get_args(get_args(kind)[1])[0]
    if dtype not in DTYPES or not (wanted is Any or np.dtype(wanted).str == dtype):
        raise ValueError(f"an array of {dtype} is not expected here")
    if any(n < 0 for n in shape) or math.prod(shape) * np.dtype(dtype).itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are no array of shape {shape}")
    # a copy: tensors that share the memory of an array want to be writable
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _decoder(kind: Any) -> Callable[[bytes], Any]:
    decode = msgspec.msgpack.Decoder(kind, dec_hook=_decode_other).decode

    def decoded(frame: bytes) -> Any:
        try:
            return decode(frame)
        except UnicodeDecodeError as error:
            raise msgspec.DecodeError(f"a text is none: {error}") from error

    return decoded


encode = msgspec.msgpack.Encoder(enc_hook=_encode_other).encode
# each raises msgspec.MsgspecError for what is nothing of its kind
decode_launch: Callable[[bytes], WorkerLaunch] = _decoder(WorkerLaunch)
decode_order: Callable[[bytes], Order] = _decoder(Order)
decode_message: Callable[[bytes], Message] = _decoder(Message)
