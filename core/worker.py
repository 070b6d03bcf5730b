"""From a Launch to a Runner: the backend and its part of the model, in whichever process this is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..backends.backend import check_members
from ..backends.formats import CheckpointFormat, Scheme
from ..backends.plugin import Launch, Plugin
from .errors import NotEnoughMemory
from .executors.executor import Report
from .files import ModelFiles
from .loading.weights import open_weights
from .models.build import build_decoder
from .models.config import ModelConfig
from .models.shard import Shard
from .quantization.select import choose_scheme
from .runner import Runner


def load_runner(
    launch: Launch,
    plugin: Plugin,
    config: ModelConfig,
    files: ModelFiles,
    scheme: Scheme | None,
    report: Report,
) -> Runner:
    """Create the backend and load what its rank holds. `scheme`: how the weights are packed; None: they are plain."""
    backend = plugin.create(launch)
    try:
        check_members(backend)
        with torch.inference_mode():
            built = build_decoder(
                config,
                launch.model,
                backend,
                open_weights(files),
                shard=shard_of(launch),
                scheme=scheme,
                progress=lambda done, total: report("load", done, total, "B"),
            )
    except MemoryError:
        backend.close()
        raise NotEnoughMemory(
            f"the weights need {human_size(launch.model.weight_bytes)} and do not fit; take a "
            "smaller model, --dtype bfloat16, --quantize, or --num-shard with more devices"
        ) from None
    except BaseException:
        backend.close()
        raise
    return Runner(backend, launch, built.model, built.report)


def shard_of(launch: Launch) -> Shard:
    """The part of the model that a rank holds."""
    ranks = launch.groups["tensor"]
    return Shard(rank=ranks.index(launch.worker.rank), size=len(ranks))


def scheme_of(
    files: ModelFiles, quantize: str | None, own: Sequence[CheckpointFormat]
) -> Scheme | None:
    """How the weights are packed, or are to be; `own` are the formats that the plugin brings. Raises Incompatible."""
    is_gguf = files.weights[0].suffix.lower() == ".gguf"
    return choose_scheme(files.config, quantize, own, weights_are_gguf=is_gguf)


def are_packed(files: ModelFiles, quantize: str | None, own: Sequence[CheckpointFormat]) -> bool:
    """Whether linear layers come packed, or will be. Raises Incompatible, ModelFormatError and ModelNotFound."""
    return scheme_of(files, quantize, own) is not None or bool(open_weights(files).ggml_kinds)


def human_size(num_bytes: int) -> str:
    """Such as 1.5 GiB."""
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"
