"""A second real model, with the other kind of vocabulary, stored plus-one norms and K blocks. Takes minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chipset.core.files import ModelFiles
from chipset.core.loading.cache import Cache
from chipset.core.loading.gguf_source import GgufSource
from chipset.core.loading.resolve import find_model
from chipset.core.text.tokenizer import Tokenizer

from .gemma import fetch_gemma

pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.e2e,
    pytest.mark.filterwarnings("default"),
]

TEXTS = [
    "Hello world", "  two  spaces\n\n\ttab", "12,345 3.14", "日本語 한국어 हिन्दी", "🎉 👩‍👩‍👧", "𒀀",
    "def f(x):\n    return x ** 2\n", "<start_of_turn>user\nhi<end_of_turn>\n<bos><eos>",
    "<table><tr>", "▁x ▁▁", "a" * 300, " ", "", "\r\n x\r\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    folder: Path = Cache.default().root / "tests"
    return find_model(str(fetch_gemma(folder)))


def test_config_says_what_transformers_reads(files: ModelFiles) -> None:
    from transformers import AutoConfig

    path = files.weights[0]
    expected = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    found = AutoConfig.from_pretrained(files.config.parent).to_dict()
    unsaid = {
        "_name_or_path", "_model_name_or_path", "architectures", "hidden_act",
        "sliding_window_pattern", "unk_token_id", "rms_norm_eps",
    }  # fmt: skip
    assert {k: v for k, v in found.items() if k not in unsaid} == {
        k: v for k, v in expected.items() if k not in unsaid
    }
    assert json.loads(files.config.read_text())["architectures"] == ["Gemma3ForCausalLM"]


def test_tokenizer_is_the_one_that_transformers_makes(files: ModelFiles) -> None:
    from transformers import AutoTokenizer

    path = files.weights[0]
    oracle = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = Tokenizer.load(files)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text)
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        stream = tokenizer.detokenizer()
        pieces = [*(stream.push(token) for token in ids), stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids)


def test_weights_are_bit_for_bit_what_transformers_reads(files: ModelFiles) -> None:
    from transformers import AutoModelForCausalLM

    path = files.weights[0]
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    expected = model.state_dict()
    expected.pop("lm_head.weight")
    source = GgufSource(path)
    weights = {name: source.read(name) for name in source.names}
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor.float(), expected[name]), name
