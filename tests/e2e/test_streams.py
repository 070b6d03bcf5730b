"""Sixty-four streams at once, on a cache that cannot hold them: every text as if it had run alone."""

import asyncio
import json
import random
import time

import httpx
import pytest
import torch
from served import served
from ties import gap_of

from chipset.core.conformance.ties import Comparison

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
        yield f"{start}Story {number}, about {topics}.\n\nOnce upon a time,", draw.randint(8, 32)


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


@pytest.fixture(scope="module")
def crowded_server(tmp_path_factory, plain_folder):
    """A cache that holds a few of the streams, small steps, and a request put back every few steps."""
    log = tmp_path_factory.mktemp("crowded") / "log.txt"
    memory = ["--kv-cache-memory", "48MiB", "--max-batch-prefill-tokens", "96"]
    flags = (plain_folder, "--dtype", "float32", *memory, "--debug-preempt-every", "5")
    with served(log, *flags) as running:
        yield running


def test_sixty_four_streams_give_the_texts_that_each_gives_alone(
    crowded_server, server, reference, tokenizer
):
    cases = list(prompts())
    together = asyncio.run(run(crowded_server.url, cases, NUM_STREAMS))
    time.sleep(1)  # the counters are at most half a second old
    preemptions, hits = (crowded_server.metric(name) for name in (PREEMPTIONS, HITS))
    alone = asyncio.run(run(server.url, cases, 1))
    print(
        f"{sum(map(len, together))} tokens, {preemptions:.0f} preemptions, "
        f"{hits:.0f} prompt tokens from the prefix cache"
    )

    def logits(text):
        with torch.no_grad():
            return reference(torch.tensor([text])).logits[0, -1]

    comparison = Comparison(gap_of(logits))
    for (prompt, _), ours, theirs in zip(cases, together, alone, strict=True):
        comparison.add(prompt[-60:], tokenizer.encode(prompt), ours, theirs)
    print(comparison)
    comparison.check()
    assert preemptions >= 10
    assert hits > 0
