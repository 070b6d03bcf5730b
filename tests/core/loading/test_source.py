from __future__ import annotations

from pathlib import Path

import pytest

from chipset.core.errors import ModelNotFound
from chipset.core.loading.source import (
    DEFAULT_WHEEL,
    DirectorySource,
    GgufSource,
    HubSource,
    PypiSource,
    parse_source,
)


def test_a_hub_id_may_name_its_revision() -> None:
    assert parse_source("org/Model-1.5") == HubSource("org/Model-1.5")
    assert parse_source("org/model@v1.0") == HubSource("org/model", "v1.0")
    assert parse_source("org/model", "refs/pr/1") == HubSource("org/model", "refs/pr/1")
    assert parse_source("org/model@main", "main") == HubSource("org/model", "main")


def test_a_path_that_exists_goes_before_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "small.GGUF").touch()
    monkeypatch.chdir(tmp_path)
    assert parse_source("org/model") == DirectorySource(tmp_path / "org" / "model")
    assert parse_source("small.GGUF") == GgufSource(tmp_path / "small.GGUF")


def test_a_wheel_names_package_version_and_file() -> None:
    assert parse_source("pypi:some-model==1.0/m.gguf") == PypiSource("some-model", "1.0", "m.gguf")


def test_the_default_wheel_is_checked_however_it_is_named() -> None:
    parsed = parse_source(str(DEFAULT_WHEEL))
    assert isinstance(parsed, PypiSource)
    assert parsed.sha256 == DEFAULT_WHEEL.sha256


@pytest.mark.parametrize(
    "model",
    [
        "", "model", "a/b/c", "/no/such/folder", "./no.gguf", "org/no.gguf", "../secret",
        "org/..", "org/a--b", "or\0g/model", "http://host/model", "org/model@../../x",
        "pypi:package/file.gguf", "pypi:package==1/../file.gguf", "pypi:package==1/file.bin",
        "pypi:-r==1/file.gguf", "pypi:a b==1/file.gguf",
    ],
)  # fmt: skip
def test_anything_else_is_told_the_forms(model: str) -> None:
    with pytest.raises(ModelNotFound, match="hub id ORG/NAME"):
        parse_source(model)


def test_only_hub_models_have_revisions(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="leave out --revision"):
        parse_source(str(tmp_path), "main")


def test_two_revisions_are_one_too_many() -> None:
    with pytest.raises(ModelNotFound, match="differ"):
        parse_source("org/model@v1", "v2")


@pytest.mark.parametrize("revision", ["", "../../etc", "a b", "x\0"])
def test_a_revision_is_a_plain_name(revision: str) -> None:
    with pytest.raises(ModelNotFound, match="is no revision"):
        parse_source("org/model", revision)
