"""A tiny random Llama, and engines over it on a named backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chipset.backends.options import EngineOptions
from chipset.core.engine import Engine
from chipset.core.files import ModelFiles
from chipset.core.messages import EngineLaunch
from chipset.core.startup import start_engine

LLAMA = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    return folder


def engine(folder: Path, backend: str, *, preempt_every: int = 0, **options: object) -> Engine:
    files = ModelFiles(
        source=str(folder),
        name=folder.name,
        revision=None,
        config=folder / "config.json",
        tokenizer=folder / "tokenizer.json",
        tokenizer_config=None,
        chat_template=None,
        generation_config=None,
        weights=tuple(sorted(folder.glob("*.safetensors"))),
    )
    launch = EngineLaunch(
        commands="",
        events="",
        files=files,
        backend=backend,
        options=EngineOptions(**({"dtype": "float32"} | options)),
        preempt_every=preempt_every,
    )
    return start_engine(launch, lambda *progress: None)
