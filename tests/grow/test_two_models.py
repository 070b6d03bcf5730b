"""Room to grow: two models, each with a cache of its own, in one worker."""

from __future__ import annotations

import pytest

from chipset.core.files import ModelFiles

from .driver import driving

PROMPTS = ([5, 9, 2, 77, 140], list(range(20, 50)))
COUNT = 12


@pytest.mark.parametrize("size", [16, 24])
def test_two_models_take_turns_in_one_worker(
    backend: str, model: ModelFiles, other_model: ModelFiles, size: int
) -> None:
    alone = []
    for files in (model, other_model):
        with driving("cpu", files) as driver:
            alone.append(driver.generate([driver.open(prompt) for prompt in PROMPTS], COUNT))
    assert alone[0] != alone[1]
    with driving(backend, model) as one, driving(backend, other_model, (size,)) as other:
        both = [(d, [d.open(prompt) for prompt in PROMPTS]) for d in (one, other)]
        for _ in range(COUNT):
            for driver, requests in both:
                driver.generate(requests, 1)
        for texts, (_, requests) in zip(alone, both, strict=True):
            assert [request.tokens[request.num_prompt :] for request in requests] == texts
