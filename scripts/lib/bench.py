"""Output tokens a second through HTTP, beside Transformers' generate on the same machine in the same run.

python scripts/lib/bench.py [--rounds N] [--streams 1 8 32] [--dtype bfloat16] [--prompt 256] [--new 64]
                            [--profile | --beside CHECKOUT]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import httpx
import torch
from served import served
from step_profile import print_profile

from chipset.core.files import ModelFiles
from chipset.core.loading.resolve import find_model

MAX_TOKEN = 40_000


class Peer:
    """Transformers' generate of the same file, in process."""

    def __init__(self, files: ModelFiles, dtype: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoModelForCausalLM

            (weights,) = files.weights
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                weights.parent, gguf_file=weights.name, dtype=getattr(torch, dtype)
            ).eval()
        # a peer that keeps its weights packed, or in another dtype, would be another comparison
        assert {p.dtype for p in self.model.parameters()} == {getattr(torch, dtype)}

    @torch.no_grad()
    def rate(self, prompts: list[list[int]], new: int) -> float:
        """Output tokens a second, prefill included."""
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        whole = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - start
        assert whole.shape[1] == ids.shape[1] + new
        return len(prompts) * new / seconds


async def _stream(client: httpx.AsyncClient, prompt: list[int], new: int) -> int:
    body = {
        "prompt": prompt,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    usage = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                usage = (event.get("usage") or {}).get("completion_tokens", usage)
    return usage


async def our_rate(url: str, prompts: list[list[int]], new: int) -> float:
    """Output tokens a second of as many streams as there are prompts, prefill included."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        start = time.perf_counter()
        counts = await asyncio.gather(*(_stream(client, prompt, new) for prompt in prompts))
        seconds = time.perf_counter() - start
    assert counts == [new] * len(prompts), counts
    return sum(counts) / seconds


def random_prompts(draw: random.Random, number: int, length: int) -> list[list[int]]:
    return [[draw.randrange(100, MAX_TOKEN) for _ in range(length)] for _ in range(number)]


def show(name: str, rates: list[float], base: float) -> None:
    median = statistics.median(rates)
    print(
        f"{name:32} {median:8.1f} tokens/s  ({min(rates):.1f} to {max(rates):.1f})"
        f"  {median / base:5.2f} x one prompt of Transformers",
        flush=True,
    )


def beside(options: argparse.Namespace) -> None:
    """This checkout and another in turn, each round both, on the same prompts."""
    draw = random.Random(0)
    ratios: dict[int, list[float]] = {n: [] for n in options.streams}
    with tempfile.TemporaryDirectory() as folder:
        logs, flags = Path(folder), ("--dtype", options.dtype)
        with (
            served(logs / "ours.txt", *flags) as ours,
            served(logs / "theirs.txt", *flags, checkout=options.beside) as theirs,
        ):
            for url in (ours.url, theirs.url):
                asyncio.run(our_rate(url, random_prompts(draw, 1, 16), 4))
            for number, found in ratios.items():
                for turn in range(options.rounds):
                    prompts = random_prompts(draw, number, options.prompt)
                    # who goes first changes, for the second finds a warmer machine
                    urls = (ours.url, theirs.url) if turn % 2 else (theirs.url, ours.url)
                    rates = {u: asyncio.run(our_rate(u, prompts, options.new)) for u in urls}
                    found.append(rates[ours.url] / rates[theirs.url])
                median = statistics.median(found)
                print(
                    f"{number:3} streams: {median:.3f} x {options.beside} "
                    f"({min(found):.3f} to {max(found):.3f}, {options.rounds} rounds)",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--profile", action="store_true", help="where the time of one step goes")
    parser.add_argument("--beside", type=Path, help="another checkout, in turn with this one")
    options = parser.parse_args()
    if options.beside is not None:
        beside(options)
        return
    files = find_model(None)
    if options.profile:
        print_profile(files, options.dtype, options.streams, options.prompt)
        return
    draw = random.Random(0)
    peer = Peer(files, options.dtype)
    theirs: list[float] = []
    ours: dict[int, list[float]] = {n: [] for n in options.streams}
    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(folder) / "log.txt", "--dtype", options.dtype) as server,
    ):
        peer.rate(random_prompts(draw, 1, 16), 4)
        asyncio.run(our_rate(server.url, random_prompts(draw, 1, 16), 4))
        for _ in range(options.rounds):
            theirs.append(peer.rate(random_prompts(draw, 1, options.prompt), options.new))
            for number, rates in ours.items():
                prompts = random_prompts(draw, number, options.prompt)
                rates.append(asyncio.run(our_rate(server.url, prompts, options.new)))
    print(
        f"{files.name}, {options.dtype}, {options.prompt} prompt tokens, {options.new} new ones; "
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {options.rounds}"
    )
    base = statistics.median(theirs)
    show("Transformers, 1 prompt", theirs, base)
    for number, rates in ours.items():
        show(f"chipset, {number} streams", rates, base)


if __name__ == "__main__":
    main()
