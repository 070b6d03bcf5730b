"""A folder in the hub's layout: which of its files make the model."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from ..errors import ModelError, ModelFormatError, ModelNotFound, UnsafeWeights
from ..files import ModelFiles

SETTINGS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Every file beside the weights that serving reads; the first two are needed."""
NEEDED = SETTINGS[:2]
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def folder_files(
    folder: Path, *, source: str, name: str, revision: str | None = None
) -> ModelFiles:
    """The files of a folder; raises ModelNotFound, UnsafeWeights or ModelFormatError."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    require_settings(names, source)
    weights = choose_weights(names, source)
    if INDEX in names:
        weights = index_shards(folder / INDEX)
        missing = sorted(set(weights) - set(names))
        if missing:
            raise ModelFormatError(f"{source} lacks {missing[0]}, which its index lists.")
    paths = {name: folder / name for name in names}
    return ModelFiles(
        source=source,
        name=name,
        revision=revision,
        config=paths["config.json"],
        tokenizer=paths["tokenizer.json"],
        tokenizer_config=paths.get("tokenizer_config.json"),
        chat_template=paths.get("chat_template.jinja"),
        generation_config=paths.get("generation_config.json"),
        weights=tuple(paths[weight] for weight in weights),
    )


def require_settings(names: Collection[str], source: str) -> None:
    """Raise ModelNotFound unless config and tokenizer are among the files."""
    for needed in NEEDED:
        if needed not in names:
            cure = (
                " (Transformers writes one: save_pretrained)" if needed == "tokenizer.json" else ""
            )
            raise ModelNotFound(f"{source} has no {needed}, which serving it needs{cure}.")


def choose_weights(names: Collection[str], source: str) -> Sequence[str]:
    """The safetensors among the files of a model; only the index where there is one. Never a pickle."""
    for name in (INDEX, "model.safetensors"):
        if name in names:
            return [name]
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if found:
        return found
    raise _no_weights(names, source)


def _no_weights(names: Collection[str], source: str) -> ModelError:
    if any(name.endswith(_PICKLED) for name in names):
        return UnsafeWeights(
            f"{source} has only pickled weights, which can run code when they are opened: "
            "load them with Transformers on a machine you can lose and call save_pretrained(FOLDER), "
            "which writes safetensors; then serve FOLDER."
        )
    if any(name.endswith(".gguf") for name in names):
        return ModelNotFound(
            f"{source} has only .gguf weights: download one of the files and serve its path."
        )
    return ModelNotFound(f"{source} holds no safetensors weights.")


def index_shards(index: Path) -> Sequence[str]:
    """File names of an index, each a plain name in its own folder; raises ModelFormatError."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    if not names:
        raise ModelFormatError(f"{index} lists no files.")
    return names
