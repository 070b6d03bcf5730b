"""Greedy text and bfloat16 logits of the default model, beside Transformers'."""

import copy
import json
from pathlib import Path

import httpx
import pytest
import torch
from ties import gap_of

from chipset.backends.options import EngineOptions, SamplingParams
from chipset.core.conformance.ties import Comparison
from chipset.core.messages import EngineLaunch, Submit
from chipset.core.startup import start_engine

PROMPTS = json.loads((Path(__file__).parent / "prompts.json").read_text())
NUM_NEW = 64
NUM_BEST = 20
MEAN_ERROR = 0.1
"""Of the best tokens' log-probabilities: bfloat16 here against Transformers' float32, in nats."""
PEER_SHARE = 1.25
"""Most that our mean error may be of Transformers' own in bfloat16: the same rounding, in another order."""
TOP_1_AGREEMENT = 0.95


def last_logits(reference):
    def logits(text):
        with torch.no_grad():
            return reference(torch.tensor([text])).logits[0, -1]

    return logits


def test_greedy_text_is_token_identical_to_transformers(server, reference, tokenizer):
    assert len(PROMPTS) == 20
    comparison = Comparison(gap_of(last_logits(reference)))
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
    print(comparison)
    comparison.check()


@pytest.fixture
def bfloat16_engine(model_files):
    options = EngineOptions(dtype="bfloat16", kv_bytes=256 * 2**20)
    launch = EngineLaunch(commands="", events="", files=model_files, backend="cpu", options=options)
    engine = start_engine(launch, lambda *_: None)
    yield engine
    engine.close()


def drawn_tokens(engine, tokenizer, prompt):
    """The prompt's ids, and what the engine draws after them."""
    ids = tokenizer.encode(prompt)
    engine.submit(
        Submit(
            request_id=0,
            prompt=ids,
            sampling=SamplingParams(num_logprobs=NUM_BEST),
            max_new_tokens=16,
            stop_ids=list(tokenizer.eos_ids),
        )
    )
    drawn = []
    while not engine.is_idle:
        drawn += [token for output in engine.step() for token in output.tokens]
    return ids, drawn


def log_probabilities(model, text):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([text])).logits[0].float(), -1)


def test_bfloat16_logits_stay_within_the_stated_tolerance(bfloat16_engine, reference, tokenizer):
    """Teacher-forced: all see the text that ours drew, token by token."""
    peer = copy.deepcopy(reference).bfloat16()
    ours, theirs, agreements = [], [], []
    for prompt in PROMPTS:
        ids, drawn = drawn_tokens(bfloat16_engine, tokenizer, prompt)
        text = [*ids, *(token.id for token in drawn)]
        exact, rounded = log_probabilities(reference, text), log_probabilities(peer, text)
        for at, token in enumerate(drawn, len(ids) - 1):
            best = exact[at, token.top_ids]
            ours.append((torch.tensor(token.top_logprobs) - best).abs())
            theirs.append((rounded[at, token.top_ids] - best).abs())
            agreements.append(exact[at].argmax().item() == token.id)
    our_mean, their_mean = torch.cat(ours).mean().item(), torch.cat(theirs).mean().item()
    agreement = sum(agreements) / len(agreements)
    print(
        f"{len(agreements)} tokens: mean error {our_mean:.4f} nats (Transformers in bfloat16: "
        f"{their_mean:.4f}), largest {torch.cat(ours).max():.3f} ({torch.cat(theirs).max():.3f}), "
        f"top-1 agreement {agreement:.3f}"
    )
    assert our_mean <= MEAN_ERROR
    assert our_mean <= PEER_SHARE * their_mean
    assert agreement >= TOP_1_AGREEMENT
