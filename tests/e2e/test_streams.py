"""Sixty-four streams at once, on a cache that cannot hold them: every text as if it had run alone."""

import asyncio
import json
import random
import time

import httpx
import torch
from ties import Comparison

NUM_STREAMS = 64
PREEMPTIONS, HITS = "vllm:num_preemptions_total", "vllm:prefix_cache_hits_total"
SHARED = [
    "You are a patient teacher who explains everything with small examples from daily life. " * 6,
    "The following is a conversation between a traveller and a librarian in an old city. " * 9,
]
TOPICS = [
    "rain",
    "bread",
    "music",
    "rivers",
    "maps",
    "clocks",
    "trains",
    "bees",
    "snow",
    "glass",
    "paper",
    "salt",
]


def prompts():
    draw = random.Random(3)
    for number in range(NUM_STREAMS):
        start = draw.choice([*SHARED, ""])
        topics = " and ".join(draw.choices(TOPICS, k=draw.randint(1, 30)))
        yield f"{start}Question {number}: tell me about {topics}.\nAnswer:", draw.randint(8, 48)


async def stream(client: httpx.AsyncClient, prompt: str, new: int) -> list[int]:
    """The ids that /generate_stream sends."""
    body = {"inputs": prompt, "parameters": {"max_new_tokens": new}}
    ids = []
    async with client.stream("POST", "/generate_stream", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                event = json.loads(line[5:])
                assert "error" not in event, event
                ids.append(event["token"]["id"])
    return ids


async def run(url: str, cases: list[tuple[str, int]], at_once: int) -> list[list[int]]:
    gate = asyncio.Semaphore(at_once)
    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(prompt: str, new: int) -> list[int]:
            async with gate:
                return await stream(client, prompt, new)

        return list(await asyncio.gather(*(one(*case) for case in cases)))


def test_sixty_four_streams_give_the_texts_that_each_gives_alone(server, reference, tokenizer):
    cases = list(prompts())
    before = [server.metric(name) for name in (PREEMPTIONS, HITS)]
    together = asyncio.run(run(server.url, cases, NUM_STREAMS))
    time.sleep(1)  # the counters are at most half a second old
    after = [server.metric(name) for name in (PREEMPTIONS, HITS)]
    preemptions, hits = (b - a for a, b in zip(before, after, strict=True))
    alone = asyncio.run(run(server.url, cases, 1))
    print(f"{preemptions:.0f} preemptions, {hits:.0f} prompt tokens from the prefix cache")

    def logits(text):
        with torch.no_grad():
            return reference(torch.tensor([text])).logits[0, -1]

    comparison = Comparison(logits)
    for (prompt, _), ours, theirs in zip(cases, together, alone, strict=True):
        comparison.add(prompt[-60:], tokenizer.encode(prompt), ours, theirs)
    comparison.check()
    assert preemptions > 0
    assert hits > 0
