"""Random traffic for an engine, and what comes of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...backends.options import SamplingParams
from ..engine import Engine
from ..messages import Submit, Token

MAX_IDLE_STEPS = 10_000
"""More steps than any traffic here takes: an engine that needs them will never end."""


LULL, LULL_STEPS = 20, 100
"""Before every so many requests, so many steps without any that is new."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A request, the step before which it comes, and the step before which its client leaves."""

    submit: Submit
    step: int = 0
    leaves: int | None = None


@dataclass(kw_only=True, slots=True)
class Answer:
    """What one request got."""

    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ids(self) -> list[int]:
        """Of the tokens."""
        return [token.id for token in self.tokens]


def make_submit(
    request_id: int,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingParams | None = None,
) -> Submit:
    """A request that nothing but its length ends."""
    return Submit(
        request_id=request_id,
        prompt=list(prompt),
        sampling=sampling or SamplingParams(num_logprobs=2),
        max_new_tokens=max_new_tokens,
        stop_ids=[],
    )


def random_traffic(
    count: int, *, vocab_size: int, max_prompt: int, max_new: int, seed: int
) -> list[Arrival]:
    """`count` greedy requests: short and long prompts, some behind shared prefixes, some whose clients leave."""
    draw = random.Random(seed)
    prefixes = [[draw.randrange(vocab_size) for _ in range(max_prompt // 2)] for _ in range(3)]
    arrivals, step = [], 0
    for number in range(count):
        shared = draw.choice(prefixes)[: draw.randint(0, max_prompt // 2)] if number % 2 else []
        own = draw.randint(1, draw.choice((4, max_prompt // 8, max_prompt - len(shared))))
        if number % LULL == 0:
            # alone at first: its steps draw nothing where prompts are cut
            step, shared, own = step + LULL_STEPS, [], max_prompt
        prompt = [*shared, *(draw.randrange(vocab_size) for _ in range(own))]
        step += draw.choice((0, 0, 1, 1, 2, 4))
        leaves = step + draw.randint(1, 2 * max_new) if draw.random() < 0.1 else None
        new = draw.randint(1, max_new)
        arrivals.append(Arrival(submit=make_submit(number, prompt, new), step=step, leaves=leaves))
    return arrivals


def serve(engine: Engine, arrivals: Sequence[Arrival]) -> dict[int, Answer]:
    """Run until every request has come to its end or its client has left; asserts that the blocks come back."""
    answers = {arrival.submit.request_id: Answer() for arrival in arrivals}
    last = max(max(a.step, a.leaves or 0) for a in arrivals)
    for step in range(last + MAX_IDLE_STEPS):
        for arrival in arrivals:
            if arrival.step == step:
                engine.submit(arrival.submit)
            if arrival.leaves == step:
                engine.cancel([arrival.submit.request_id])
        if engine.is_idle and step > last:
            break
        for output in engine.step():
            answer = answers[output.request_id]
            answer.tokens += output.tokens
            answer.finish_reason, answer.error = output.finish_reason, output.error
    assert engine.is_idle, "the engine does not come to an end"
    engine.check()
    assert engine.scheduler.kv.num_held == 0, "blocks are held by nobody's request"
    return answers
