"""Greedy text and bfloat16 logits of the default model, beside Transformers'."""

import json
from pathlib import Path

import httpx
import pytest
import torch
from ties import Comparison

from chipset.backends.options import EngineOptions, SamplingParams
from chipset.core.messages import EngineLaunch, Submit
from chipset.core.startup import start_engine

PROMPTS = json.loads((Path(__file__).parent / "prompts.json").read_text())
NUM_NEW = 64
MEAN_LOGPROB_ERROR = 0.05
"""Mean |difference| of the 20 best tokens' log-probabilities, bfloat16 here against float32 there."""
MAX_LOGPROB_ERROR = 1.0
TOP_1_AGREEMENT = 0.95


def last_logits(reference):
    def logits(text):
        with torch.no_grad():
            return reference(torch.tensor([text])).logits[0, -1]

    return logits


def test_greedy_text_is_token_identical_to_transformers(server, reference, tokenizer):
    assert len(PROMPTS) == 20
    comparison = Comparison(last_logits(reference))
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        with torch.no_grad():
            whole = reference.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=NUM_NEW,
                do_sample=False,
                pad_token_id=0,
            )
        body = {"inputs": prompt, "parameters": {"max_new_tokens": NUM_NEW, "details": True}}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=120).json()
        ours = [token["id"] for token in answer["details"]["tokens"]]
        comparison.add(prompt, ids, ours, whole[0, len(ids) :].tolist())
    comparison.check()


@pytest.fixture
def bfloat16_engine(model_files):
    options = EngineOptions(dtype="bfloat16", kv_bytes=256 * 2**20)
    launch = EngineLaunch(commands="", events="", files=model_files, backend="cpu", options=options)
    engine = start_engine(launch, lambda *_: None)
    yield engine
    engine.close()


def test_bfloat16_logits_stay_within_the_stated_tolerance(bfloat16_engine, reference, tokenizer):
    """Teacher-forced: both see the text that ours drew, token by token."""
    engine, errors, agreements, worst = bfloat16_engine, [], [], 0.0
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt)
        sampling = SamplingParams(num_logprobs=20)
        engine.submit(
            Submit(
                request_id=number,
                prompt=ids,
                sampling=sampling,
                max_new_tokens=16,
                stop_ids=list(tokenizer.eos_ids),
            )
        )
        drawn = []
        while not engine.is_idle:
            drawn += [token for output in engine.step() for token in output.tokens]
        text = [*ids, *(token.id for token in drawn)]
        with torch.no_grad():
            theirs = torch.log_softmax(reference(torch.tensor([text])).logits[0].float(), -1)
        for at, token in enumerate(drawn, len(ids) - 1):
            for top, logprob in zip(token.top_ids, token.top_logprobs, strict=True):
                errors.append(abs(logprob - theirs[at, top].item()))
                worst = max(worst, errors[-1])
            agreements.append(theirs[at].argmax().item() == token.id)
    mean, agreement = sum(errors) / len(errors), sum(agreements) / len(agreements)
    print(
        f"{len(agreements)} tokens: mean {mean:.4f}, largest {worst:.4f}, top-1 agreement {agreement:.3f}"
    )
    assert mean <= MEAN_LOGPROB_ERROR
    assert worst <= MAX_LOGPROB_ERROR
    assert agreement >= TOP_1_AGREEMENT
