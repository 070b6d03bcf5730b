"""Room to grow: tokens drafted from the text itself, checked by one step that has a row of logits for each."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from chipset.backends.errors import TooLarge
from chipset.backends.options import SamplingParams
from chipset.backends.step import SamplingBatch, StepBatch
from chipset.core.files import ModelFiles
from chipset.core.request import Request

from .driver import Driver, driving

PROMPT = [7, 3, 7, 3, 7, 3, 250, 11, 7, 3, 7, 3]
NUM_DRAFTS, COUNT = 4, 40
FEW = dict.fromkeys(PROMPT, 60.0)
"""Only these are drawn, so that what came before comes again."""
GREEDY = SamplingParams(logit_bias=FEW)
SAMPLED = SamplingParams(logit_bias=FEW, temperature=0.6, seed=2**40 + 5)


def drafted(tokens: list[int]) -> list[int]:
    """What followed the last two tokens when they came together before, or the last token over and over."""
    for at in range(len(tokens) - 3, -1, -1):
        if tokens[at : at + 2] == tokens[-2:]:
            found = tokens[at + 2 : at + 2 + NUM_DRAFTS]
            return (found + found * NUM_DRAFTS)[:NUM_DRAFTS]
    return tokens[-1:] * NUM_DRAFTS


def scoring_all(batch: StepBatch, num_slots: int) -> StepBatch:
    """The batch of one decode row, with logits for each of its tokens; no slot keeps what is drawn."""
    count = batch.num_tokens
    arrays = {f.name: getattr(batch.sampling, f.name) for f in fields(SamplingBatch)}
    for name, array in arrays.items():
        if name != "features" and array is not None:
            array[:count] = array[0]
    arrays["position"][:count] -= np.arange(count, dtype=np.int32)[::-1]
    arrays["slot"][:] = num_slots
    batch.logit_index[:count] = np.arange(count)
    return replace(batch, num_logits=count, sampling=SamplingBatch(**arrays))


def generate_drafting(driver: Driver, request: Request) -> int:
    """COUNT tokens; how many steps it took."""
    num_steps = 1
    driver.generate([request], 1)
    while request.num_output < COUNT:
        drafts = drafted(request.tokens)
        request.tokens += drafts
        output = driver.run(
            driver.rows([request]),
            1 + NUM_DRAFTS,
            lambda batch: scoring_all(batch, driver.runner.builder.num_slots),
        )
        del request.tokens[-NUM_DRAFTS:]
        drawn = np.asarray(output.ids)[: 1 + NUM_DRAFTS].tolist()
        hits = [a == b for a, b in zip(drafts, drawn, strict=False)]
        for token in drawn[: [*hits, False].index(False) + 1]:
            request.draw(token)
        request.advance(len(request.tokens) - 1 - request.num_computed)
        num_steps += 1
    return num_steps


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_change_no_text(backend: str, model: ModelFiles, sampling: SamplingParams) -> None:
    with driving("cpu", model) as driver:
        (plain,) = driver.generate([driver.open(PROMPT, sampling)], COUNT)
    with driving(backend, model, max_batch_rows=8) as driver:
        request = driver.open(PROMPT, sampling)
        try:
            num_steps = generate_drafting(driver, request)
        except TooLarge as error:
            pytest.skip(f"{backend} has no bucket for drafts: {error}")
        assert request.tokens[request.num_prompt :][:COUNT] == plain
        assert num_steps < COUNT, "no draft was right"
