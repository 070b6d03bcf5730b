"""A second architecture end to end: windows beside full attention, two ropes, sandwich norms, another tokenizer."""

import pytest
import torch
from ties import gap_of

from chipset.backends.options import EngineOptions, SamplingParams
from chipset.core.conformance.ties import Comparison
from chipset.core.loading.cache import Cache
from chipset.core.loading.resolve import find_model
from chipset.core.messages import EngineLaunch, Submit
from chipset.core.startup import start_engine
from chipset.core.text.tokenizer import Tokenizer

from ..core.loading.gemma import fetch_gemma

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.filterwarnings("default")]

NUM_NEW = 24
LONG = "The train left the old station at seven, and nobody on the platform waved. " * 45
PROMPTS = [
    "The capital of France is",
    f"{LONG}\nThe train left the old station at",  # longer than the window of 512 tokens
    f"{LONG}\nNobody on the",  # shares its blocks
]


@pytest.fixture(scope="module")
def gemma_files():
    return find_model(str(fetch_gemma(Cache.default().root / "tests")))


def test_texts_longer_than_the_window_are_token_identical_to_transformers(gemma_files):
    from transformers import AutoModelForCausalLM

    (path,) = gemma_files.weights
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokenizer = Tokenizer.load(gemma_files)
    options = EngineOptions(dtype="float32", max_context=2048, kv_bytes=256 * 2**20)
    launch = EngineLaunch(commands="", events="", files=gemma_files, backend="cpu", options=options)
    engine = start_engine(launch, lambda *_: None)
    assert {group.window for group in engine.runner.launch.model.groups} == {None, 512}
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert [len(prompt) > 600 for prompt in prompts] == [False, True, True]
    drawn: dict[int, list[int]] = {}
    cached = 0
    for batch in ([0, 1], [2]):
        for number in batch:
            engine.submit(
                Submit(
                    request_id=number,
                    prompt=prompts[number],
                    sampling=SamplingParams(),
                    max_new_tokens=NUM_NEW,
                    stop_ids=[],
                )
            )
        while not engine.is_idle:
            for output in engine.step():
                drawn.setdefault(output.request_id, []).extend(t.id for t in output.tokens)
                cached = max(cached, output.cached_tokens)
            engine.check()
    engine.close()
    assert cached >= 512

    def logits(text):
        with torch.no_grad():
            return reference(torch.tensor([text])).logits[0, -1]

    comparison = Comparison(gap_of(logits))
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_NEW,
                min_new_tokens=NUM_NEW,
                do_sample=False,
                eos_token_id=None,
            )
        comparison.add(str(number), prompt, drawn[number], whole[0, len(prompt) :].tolist())
    print(comparison)
    comparison.check()
